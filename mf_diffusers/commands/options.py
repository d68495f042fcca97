"""The options that several commands share."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mf_diffusers.geometry import EDGE_THRESHOLD, FOV_DEGREES, MAX_POINTS


def choice(*values: str) -> dict[str, Any]:
    """Settings of an option that is one of `values`."""

    def check(value: str | None) -> str | None:
        if value in ("float16", "fp16", "half"):
            raise typer.BadParameter(f"{value}: the model overflows in float16; take bfloat16 (same size) or float32.")
        if value is not None and value not in values:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(values)}.")
        return value

    return {"callback": check, "metavar": "|".join(values)}


def option(*names: str, panel: str = "Options", **settings) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


ARGUMENTS = ("SRC", "DST")
"""What stands without a flag."""

FLAGS = {
    "src": "SRC",
    "dst": "DST",
    "prompt": "--prompt",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "log2_alpha": "--log2-alpha",
    "mask_image": "--mask",
    "strength": "--strength",
    "num_refinement_steps": "--refine",
    "ensemble_size": "--ensemble",
    "height": "--height",
    "width": "--width",
    "scale": "--depth-scale",
    "key": "--depth-key",
    "invalid": "--depth-invalid",
    "infinite": "--depth-infinite",
    "maximum": "--depth-max",
    "depth_mask": "--depth-max",
    "fov_degrees": "--fov",
    "edge_threshold": "--edge-threshold",
    "max_points": "--max-points",
    "model": "--model",
    "lora": "--lora",
    "lora_weight": "--lora-weight",
    "adapter": "--adapter",
    "load_lora_weights": "--lora",
    "load_adapter": "--adapter",
    "any_base": "--any-base",
    "text_encoder": "--text-encoder",
    "predictions": "--predictions",
    "alignment": "--alignment",
    "output": "--output",
    "overwrite": "--overwrite",
    "prefix": "--prefix",
    "max_pixels": "--max-pixels",
    "device": "--device",
    "dtype": "--dtype",
    "offload": "--offload",
}
"""What the command line calls the arguments of the library, which errors name."""

METADATA_KEYS = {
    "scale": "depth_scale",
    "invalid": "depth_invalid",
    "infinite": "depth_infinite",
    "maximum": "depth_max",
}
"""What metadata.jsonl calls them, for commands without the flag."""

DTYPES = choice("auto", "bfloat16", "float32")

Model = Annotated[
    str, option("--model", "-m", envvar="MF_DIFFUSERS_MODEL", help="Folder or Hub id: diffusers or published layout.")
]
TextEncoder = Annotated[
    str | None,
    option(help="Qwen3 text encoder and tokenizer, folder or Hub repository; default: the model's, or one that fits."),
]
Lora = Annotated[str | None, option(help="LoRA: file, folder or Hub id, OWNER/NAME/FILE where it has several.")]
LoraWeight = Annotated[float, option(help="Of the LoRA; 1: as it was trained.")]
Adapter = Annotated[
    Path | None, option(help="What training in lora mode wrote, pipeline.adapter.safetensors; MODEL is then its base.")
]
AnyBase = Annotated[
    bool, option("--any-base", help="MODEL is another base of the same sizes, the distilled twin of the adapter's.")
]
Steps = Annotated[int | None, option(min=1, help="Euler steps; default: the model's for the task.")]
GuidanceScale = Annotated[
    float | None, option(min=0, help="Pull towards the prompt, off at 1; default: the model's for the task.")
]
Strength = Annotated[float | None, option(min=0, max=1, help="Share of the steps, from the picture on; default: anew.")]
Seed = Annotated[int, option(min=0, max=2**32, help="Result number i, from 0, has the seed SEED + i.")]
Side = Annotated[int | None, option(min=1, help="To work at, a multiple of 16; default: fits the input.")]
Size = Annotated[
    int | None,
    option(min=1, help="To work at, in place of the checkpoint's: longer side, or side of a square."),
]
Output = Annotated[Path, option("--output", "-o", panel="Result", help="Folder for the result folders.")]
Overwrite = Annotated[bool, option("--overwrite", panel="Result", help="Replace; default: write NAME-002 beside NAME.")]
Fov = Annotated[
    float | None,
    option(
        min=1,
        max=179,
        panel="Result",
        help=f"Degrees seen along the longer side; default: as EXIF says, else {FOV_DEGREES:g}.",
    ),
]
EdgeThreshold = Annotated[
    float, option(min=0, panel="Result", help="Points are cut where depth jumps by more than this share; 0: nowhere.")
]
MaxPoints = Annotated[int, option(min=1, panel="Result", help="Of the point cloud, and vertices of the mesh, at most.")]
Exr = Annotated[bool, option("--exr", panel="Result", help="Write depth.exr too.")]
Points = Annotated[bool, option("--points/--no-points", panel="Result", help="Write points.ply and points.glb.")]
Device = Annotated[str, option(panel="Machine", help="auto (cuda, else mps, else cpu) or a torch device.")]
Dtype = Annotated[
    str,
    option(panel="Machine", **DTYPES, help="auto: bfloat16 where the device computes in it."),
]
Offload = Annotated[
    str, option(panel="Machine", **choice("none", "model", "group"), help="Weights in main memory; group: least VRAM.")
]
Offline = Annotated[bool, option("--offline", panel="Machine", help="Ask no server; only what is on disk.")]
Quiet = Annotated[bool, option("--quiet", "-q", panel="Machine", help="Print errors alone, and what was repaired.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the commands share that make results of many sources."""

    model: Model
    steps: Steps = None
    guidance_scale: GuidanceScale = None
    seed: Seed = 0
    height: Side = None
    width: Side = None
    size: Size = None
    lora: Lora = None
    lora_weight: LoraWeight = 1.0
    adapter: Adapter = None
    any_base: AnyBase = False
    text_encoder: TextEncoder = None
    output: Output = Path("outputs")
    overwrite: Overwrite = False
    fov: Fov = None
    edge_threshold: EdgeThreshold = EDGE_THRESHOLD
    max_points: MaxPoints = MAX_POINTS
    exr: Exr = False
    points: Points = True
    device: Device = "auto"
    dtype: Dtype = "auto"
    offload: Offload = "none"
    offline: Offline = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class DepthFiles:
    """How the commands that take depth files read them."""

    depth_scale: Annotated[
        float | None, option(help="Factor of stored values, 0.001 for millimetres; default: the one in the file.")
    ] = None
    depth_key: Annotated[str | None, option(help="Array of an npz, channel of an EXR.")] = None
    depth_invalid: Annotated[
        list[float] | None, option(metavar="VALUE", help="Stored value that means missing; may be given again.")
    ] = None
    depth_infinite: Annotated[
        list[float] | None, option(metavar="VALUE", help="Stored value that means infinitely far, besides inf.")
    ] = None
    depth_max: Annotated[
        float | None,
        option(
            help="What is farther is missing; inf: nothing is. Default: what looks like a background, which is said."
        ),
    ] = None
    inverse: Annotated[
        bool, option("--inverse", help="Files hold inverse depth (bright is near), as artists' maps do.")
    ] = False

    def read(self, path: Path) -> np.ndarray:
        """The depth map in a file, as `read_depth` gives it."""
        from mf_diffusers.depth_io import read_depth

        return read_depth(
            path,
            scale=self.depth_scale,
            invalid=self.depth_invalid,
            key=self.depth_key,
            infinite=self.depth_infinite,
            maximum=self.depth_max,
            inverse=self.inverse,
        )

    def facts(self) -> dict[str, Any]:
        """These options for metadata.json, whose numbers do not include inf."""
        values = [self.depth_invalid, self.depth_infinite, self.depth_max]
        invalid, infinite, maximum = (value and str(value) for value in values)
        return asdict(self) | {"depth_invalid": invalid, "depth_infinite": infinite, "depth_max": maximum}


def shares_options(command: Callable) -> Callable:
    """The command with each field of `Options` and `DepthFiles` as an option of its own, in the place of the whole."""
    parameters = inspect.signature(command).parameters.values()
    groups = {p.name: p.annotation for p in parameters if p.annotation in (Options, DepthFiles)}

    @wraps(command)
    def called(**given):
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    parameters = [p for p in parameters if p.name not in groups]
    for group in sorted(groups.values(), key=(DepthFiles, Options).index):
        parameters += inspect.signature(group).parameters.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    called.__signature__ = inspect.Signature(parameters)
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called
