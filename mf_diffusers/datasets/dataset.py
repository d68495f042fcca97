"""A data set in the files in which it is distributed."""

import importlib.util
from functools import cached_property
from pathlib import Path

import numpy as np

from mf_diffusers.datasets.frame import Frame
from mf_diffusers.pictures import read_image


class Dataset:
    """Frames of a data set on disk, in the order of their names.

    A reader of one data set says where its frames lie (`_find`) and how one is read (`_read`).

    Args:
        root: the folder into which the data set was unpacked.
        split: one of `splits`. None: everything under `root`.

    Raises FileNotFoundError for a missing folder, or later, from `names`, when it holds no frame; ValueError for an
    unknown split or when the library that reads the files is not installed.
    """

    splits: tuple[str, ...] = ()
    """The parts that the data set itself names; unless the reader says otherwise, they are folders under the root."""

    layout = ""
    """Where a frame's depth lies under the root, for people."""

    library: str | None = None
    """What has to be installed beyond this package's own needs."""

    metric = True
    """Whether depth is in metres. False: true up to an unknown factor for each scene or frame."""

    files_per_frame = True
    """Whether frames lie in files of their own, and are read equally fast in any order."""

    def __init__(self, root: str | Path, split: str | None = None):
        self.root, self.split = Path(root), split
        kind = type(self).__name__
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder; give the one into which {kind} was unpacked")
        if split is not None and split not in self.splits:
            raise ValueError(f"{kind} has no split {split!r}, but {', '.join(self.splits) or 'none'}")
        if self.library and not importlib.util.find_spec(self.library):
            raise ValueError(f"{kind} is read with {self.library}: pip install 'mf-diffusers[datasets]'")

    @cached_property
    def names(self) -> list[str]:
        """The names of the frames, sorted."""
        names = sorted(self._find())
        if not names:
            raise FileNotFoundError(
                f"{self.root}: no frame of {type(self).__name__} lies here; expected {self.layout}"
                + (f" under {self.split}" if self.split else "")
            )
        return names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.read(self.names[index])

    def read(self, name: str) -> Frame:
        """The frame called `name`. Raises ValueError, which names it, when it cannot be read."""
        try:
            return self._read(name)
        except Exception as error:  # decoders meet damaged files with errors of many types
            raise ValueError(f"{self.root / name}: {error}") from error

    def _find(self):
        """The names of all frames of the split, in any order."""
        raise NotImplementedError

    def _read(self, name):
        raise NotImplementedError

    def _files(self, pattern):
        """Paths relative to the root that match a glob pattern within the split. Hidden files are left out."""
        for path in (self.root / (self.split or "")).glob(pattern):
            if not path.name.startswith("."):
                yield path.relative_to(self.root)


def read_rgb(path: Path) -> np.ndarray:
    """The picture at `path` as uint8 (H, W, 3), sRGB, as the sensor lay when it was taken: so does its depth."""
    return np.asarray(read_image(path, upright=False))


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """float32 (3, 3) camera matrix."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float32)
