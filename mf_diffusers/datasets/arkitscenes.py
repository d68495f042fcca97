"""ARKitScenes: rooms filmed with an iPad.

Source: https://github.com/apple/ARKitScenes (Dehghan et al., NeurIPS 2021), Apple's licence in that repository.

    ROOT/metadata.csv                                        beside Training and Validation; "sky_direction" of a video
    ROOT/Training/**/lowres_depth/VIDEO_SECONDS.png          256x192, of the LiDAR of the device (raw, 3dod)
    ROOT/Training/**/confidence/VIDEO_SECONDS.png            8 bits: 0 low, 1, 2 high (raw)
    ROOT/Training/**/lowres_wide/VIDEO_SECONDS.png           256x192
    ROOT/Training/**/highres_depth/VIDEO_SECONDS.png         1920x1440, of laser scans of the room (raw, upsampling)
    ROOT/Training/**/wide/VIDEO_SECONDS.png                  1920x1440, in some versions called "color"
    ROOT/Training/**/{lowres_wide,wide}_intrinsics/VIDEO_SECONDS.pincam      width height fx fy cx cy

Depth is z-depth as 16 bits in millimetres, 0 is missing. Depth of the device counts where its confidence is high; where
there is no folder "confidence", as in 3dod, all of it. Assets exist at different times: a frame is one of which all
are there. The time in the name of a .pincam may differ by a millisecond. Pictures are turned upright.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from mf_diffusers.depth_io import read_depth

from .dataset import Dataset, pinhole, read_rgb
from .frame import Frame


COLOURS = {"lowres_wide": "lowres_depth", "wide": "highres_depth", "color": "highres_depth"}
QUARTERS_TO_UPRIGHT = {"Up": 0, "Left": 1, "Down": 2, "Right": 3}
HIGH_CONFIDENCE = 2


class ARKitScenes(Dataset):
    """Reads ARKitScenes, unpacked as this module says.

    Frames are called "Training/VIDEO/lowres_wide/VIDEO_SECONDS" or ".../wide/..."."""

    splits = ("Training", "Validation")
    layout = "Training/VIDEO/lowres_depth/VIDEO_SECONDS.png or .../highres_depth/... and the pictures beside them"

    def __init__(self, root: str | Path, split: str | None = None):
        super().__init__(root, split)
        table = self.root / "metadata.csv"
        if not table.is_file():
            raise FileNotFoundError(f"{table}: no such file; the downloader puts it beside Training and Validation")
        with table.open(newline="") as file:
            self._sky = {int(float(row["video_id"])): row["sky_direction"] for row in csv.DictReader(file)}

    def _find(self):
        files = defaultdict(set)  # folder: the names in it
        for path in self._files("**/*.png"):
            files[path.parent].add(path.stem)
        for folder, stems in list(files.items()):
            if folder.name in COLOURS:
                stems = stems & files.get(folder.with_name(COLOURS[folder.name]), set())
                if folder.name == "lowres_wide":
                    stems = stems & files.get(folder.with_name("confidence"), stems)
                yield from (f"{folder.as_posix()}/{stem}" for stem in stems)

    def _read(self, name):
        picture = self.root / f"{name}.png"
        colour = picture.parent.name
        depth = read_depth(picture.parents[1] / COLOURS[colour] / picture.name, scale=1 / 1000)
        if colour == "lowres_wide" and (confidence := picture.parents[1] / "confidence" / picture.name).is_file():
            with Image.open(confidence) as levels:
                depth[np.asarray(levels) != HIGH_CONFIDENCE] = 0
        video = int(picture.stem.split("_")[0])
        frame = Frame(name, read_rgb(picture), depth, self._intrinsics(picture))
        return frame.turned(QUARTERS_TO_UPRIGHT.get(self._sky[video], 0))

    def _intrinsics(self, picture):
        folder = picture.parent.with_name(f"{picture.parent.name}_intrinsics")
        video, seconds = picture.stem.split("_")
        for stem in (picture.stem, *(f"{video}_{float(seconds) + shift:.3f}" for shift in (-0.001, 0.001))):
            if (path := folder / f"{stem}.pincam").is_file():
                return pinhole(*map(float, path.read_text().split()[2:]))
        return None
