"""Readers of the field's data sets, in the formats in which they are distributed."""

from .argoverse2 import Argoverse2
from .aria import Aria
from .arkitscenes import ARKitScenes
from .blendedmvs import BlendedMVS
from .dataset import Dataset
from .foundationstereo import FoundationStereo
from .frame import Frame
from .hypersim import Hypersim
from .megadepth import MegaDepth
from .paralleldomain import ParallelDomain
from .scannet import ScanNet
from .tartanair import TartanAir
from .taskonomy import Taskonomy
from .waymo import Waymo


DATASETS = {
    "argoverse2": Argoverse2,
    "aria": Aria,
    "arkitscenes": ARKitScenes,
    "blendedmvs": BlendedMVS,
    "foundationstereo": FoundationStereo,
    "hypersim": Hypersim,
    "megadepth": MegaDepth,
    "paralleldomain": ParallelDomain,
    "scannet": ScanNet,
    "tartanair": TartanAir,
    "taskonomy": Taskonomy,
    "waymo": Waymo,
}
"""The training sets of the paper (Table 1): name, reader."""

__all__ = ["DATASETS", "Dataset", "Frame", *sorted(kind.__name__ for kind in DATASETS.values())]
