"""The data of a run before it starts: readable, in whole shards, and the same in every process."""

import hashlib
import socket
import tarfile
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from finetune.data.sources import Source, WebDatasetSource, build_source, is_local


TAR_END = 1024  # bytes: a tar file ends in two empty blocks
Listing = list[tuple[str, int | None]]  # shards and their sizes in bytes; None for what is no local file


def open_sources(*configs) -> list[Source]:
    """
    The sources of a run. All processes of the run must ask at once, and where one finds a fault all raise.

    Args:
        configs: of sources, as `build_source` takes them.

    Raises:
        ValueError: a source cannot be read in some process; a local shard is empty, no tar file or cut off; or the
            processes see different shards, in name, size or order, of which each would deal itself others than
            it should. The message names the processes, and what is wrong there.
    """
    sources, fault = [], None
    try:
        sources = [build_source(config) for config in configs]
    except (ValueError, OSError) as error:
        fault = str(error)
    raise_together(fault)
    leaves = chain.from_iterable(source.leaves() for source in sources)
    shards = [shard for leaf in leaves if isinstance(leaf, WebDatasetSource) for shard in leaf.shards]
    listing = [(shard, Path(shard).stat().st_size if is_local(shard) else None) for shard in shards]
    raise_together(difference(listing))
    state = PartialState()
    raise_together(damage([s for s in shards if is_local(s)][state.process_index :: state.num_processes]))
    return sources


def open_data(*configs) -> list[Source]:
    """`open_sources` for a script: its error ends the run."""
    try:
        return open_sources(*configs)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def raise_together(fault: str | None) -> None:
    """Raises ValueError in all processes if one of them, or more, have found a fault."""
    faults = gather_object([(fault, PartialState().process_index, socket.gethostname())])
    found = defaultdict(list)
    for text, process, host in faults:
        if text is not None:
            found[text].append(f"process {process} on {host}")
    if len(faults) == 1 and found:
        raise ValueError(fault)
    if found:
        raise ValueError("\n".join(f"{', '.join(where)}: {text}" for text, where in found.items()))


def difference(listing: Listing) -> str | None:
    """What sets this process's shards apart from those that most processes see, of equally many the first."""
    digests = gather_object([hashlib.sha256(repr(listing).encode()).hexdigest()])
    if len(set(digests)) == 1:
        return None
    usual = digests.index(Counter(digests).most_common(1)[0][0])
    theirs = gather_object([listing])[usual]
    if listing == theirs:
        return None
    own, other = dict(listing), dict(theirs)
    lacking, extra = [name for name in other if name not in own], [name for name in own if name not in other]
    shared = [name for name in own if name in other]
    differing = [f"{name} ({own[name]} bytes, there {other[name]})" for name in shared if own[name] != other[name]]
    kinds = {"it lacks": lacking, "it alone has": extra, "of another size": differing}
    parts = [f"{kind} {len(names)}: {', '.join(names[:3])}" for kind, names in kinds.items() if names]
    return (
        f"its shards are not those of process {usual}: {'; '.join(parts) or 'another order'}. Copy the same shards to "
        "every node, or read them from storage that all share"
    )


def damage(shards: list[str]) -> str | None:
    """Which local shards are no whole tar files, and why."""
    reasons = {shard: reason for shard in shards if (reason := fault_of_shard(Path(shard)))}
    if not reasons:
        return None
    listed = "; ".join(f"{shard} {reason}" for shard, reason in list(reasons.items())[:5])
    return f"{len(reasons)} of {len(shards)} shards cannot be read: {listed}. Write them anew, or leave them out"


def fault_of_shard(path: Path) -> str | None:
    """Why a file is no whole tar file; None if it seems to be one, by its first block and (uncompressed) its last."""
    if path.stat().st_size == 0:
        return "is empty"
    try:
        with tarfile.open(path, "r:") as archive:
            if archive.firstmember is None:
                return "holds no files"
    except tarfile.ReadError:
        return None if tarfile.is_tarfile(path) else "is no tar file"
    with path.open("rb") as file:
        file.seek(-min(TAR_END, path.stat().st_size), 2)
        return "is cut off: it does not end as a tar file does" if any(file.read()) else None
