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
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(InputFile(path, path.stem))
            continue
        found = list(files_in(path, suffixes, of_result, is_recursive))
        if not found:
            raise FileNotFoundError(f"{path}: no file in this folder ends in {', '.join(suffixes)}")
        files += found
    return files


def files_in(
    folder: Path, suffixes: tuple[str, ...], of_result: Callable[[Path], Path], is_recursive: bool
) -> Iterator[InputFile]:
    """See `files_among`."""
    if (folder / METADATA).is_file() and (folder / "depth.npy").is_file():
        file = of_result(folder)
        yield InputFile(file, folder.resolve().name)
        return
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in inside if path.is_dir()]
    others = [path for path in inside if path not in folders and path.suffix.lower() not in suffixes]
    yield from (InputFile(path, path.stem) for path in inside if path not in folders + others)
    say_skipped(others, f"their names end in none of {', '.join(suffixes)}")
    if is_recursive:
        for path in folders:
            if not path.is_symlink():
                yield from files_in(path, suffixes, of_result, is_recursive)
    else:
        say_skipped(folders, "folders are looked into with --recursive")


def say_skipped(paths: list[Path], reason: str) -> None:
    if paths:
        names = ", ".join(map(str, paths[:SHOWN])) + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
        typer.echo(f"skipped {names}: {reason}", err=True)
