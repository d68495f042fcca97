"""Files and folders that appear whole or not at all, under names that every system takes."""

import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


ESCAPED = {"encoding": "utf-8", "errors": "backslashreplace"}
r"""How text is written that may hold file names: bytes of a name that are no UTF-8 become \udcXX, which JSON reads."""

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
NAME_BYTES = 200
"""What a name may be long: file systems take 255 bytes, of which suffixes need some."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix, which becomes `path` when the block succeeds.

    When the block raises, the temporary file is removed and whatever was at `path` before is untouched.

    Raises FileNotFoundError when the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    # Not tempfile.mkstemp: its files are readable by their owner alone, and the result would inherit that.
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(usual_mode(path.parent))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def usual_mode(folder: Path) -> int:
    """The permissions of a new file in `folder`, by the umask. Some writers, that of safetensors 0.8 for one, do not
    heed it."""
    probe = folder / f".{uuid.uuid4().hex}"
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: str | Path) -> Iterator[Path]:
    """Yield a new hidden folder in `parent`, which is made where missing. What is still there at the end is removed.

    Raises OSError, PermissionError for one, when `parent` cannot be written.
    """
    folder = Path(parent) / f".{uuid.uuid4().hex}"
    folder.mkdir(parents=True)  # not tempfile: its folders are readable by their owner alone
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place_folder(folder: Path, path: Path) -> None:
    """Rename a finished `folder` to `path` beside it, in the place of a folder that is there."""
    mode = usual_mode(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
    replaced = folder.with_suffix(".old")
    try:
        if path.exists():
            path.rename(replaced)
        folder.rename(path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


def save_whole(model: "ModelMixin | DiffusionPipeline", path: str | Path) -> None:
    """Write a pipeline or a model to the folder `path`, whole or not at all, in the place of a folder that is there.

    Raises OSError when it cannot be written; what was at `path` stays.
    """
    path = Path(path).resolve()
    with temporary_folder(path.parent) as folder:
        model.save_pretrained(folder)
        place_folder(folder, path)


def legal_name(name: str) -> str:
    """A name near `name` that Windows takes too, and short enough for every file system; "untitled" for none.

    Characters that Windows forbids become "-", dots and spaces at the end go, and names of devices (con, nul, ...) get
    an underscore.
    """
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "-", name)
    if len(os.fsencode(name)) > NAME_BYTES:
        name = os.fsencode(name)[:NAME_BYTES].decode(errors="ignore")
    name = name.rstrip(". ")
    return RESERVED.sub(r"\1_\2", name) if RESERVED.match(name) else name or "untitled"


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
