"""Which files a command works on, and what it leaves aside."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from mf_diffusers.results import METADATA


SHOWN = 5  # names of files left aside that are listed


@dataclass(frozen=True)
class InputFile:
    """A file to work on, and what its result is called."""

    path: Path
    name: str

    def __str__(self):
        return str(self.path)


def files_among(
    paths: list[Path], suffixes: tuple[str, ...], of_result: Callable[[Path], Path], is_recursive: bool
) -> list[InputFile]:
    """The files among `paths` and, of the folders among them, those to work on, sorted.

    What is left aside in folders is said on stderr.

    Args:
        suffixes: in which files of a folder end that are worked on.
        of_result: makes of a result folder the one file of it that is worked on.
        is_recursive: whether folders in folders are looked into.

    Raises FileNotFoundError for a folder without such a file.
    """
    files, skipped = [], []
    for path in paths:
        if not path.is_dir():
            files.append(InputFile(path, path.stem))
            continue
        found = list(files_in(path, suffixes, of_result, is_recursive, skipped))
        if not found:
            folders = "" if is_recursive else "; folders in it are looked into with --recursive"
            raise FileNotFoundError(f"{path}: no file in this folder ends in {', '.join(suffixes)}{folders}")
        files += found
    for line in skipped:
        typer.echo(line, err=True)
    return files


def files_in(
    folder: Path, suffixes: tuple[str, ...], of_result: Callable[[Path], Path], is_recursive: bool, skipped: list[str]
) -> Iterator[InputFile]:
    """The files in a folder, see `files_among`; what is left aside is noted in `skipped`."""
    if (folder / METADATA).is_file() and (folder / "depth.npy").is_file():
        file = of_result(folder)
        yield InputFile(file, folder.resolve().name)
        return
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in inside if path.is_dir()]
    others = [path for path in inside if path not in folders and path.suffix.lower() not in suffixes]
    yield from (InputFile(path, path.stem) for path in inside if path not in folders + others)
    if others:
        skipped.append(f"skipped {listed(others)}: their names end in none of {', '.join(suffixes)}")
    if is_recursive:
        links = [path for path in folders if path.is_symlink()]  # which may lead in circles
        if links:
            skipped.append(f"skipped {listed(links)}: links to folders are not followed")
        for path in folders:
            if path not in links:
                yield from files_in(path, suffixes, of_result, is_recursive, skipped)
    elif folders:
        skipped.append(f"skipped {listed(folders)}: folders are looked into with --recursive")


def listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:SHOWN])) + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
