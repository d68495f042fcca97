"""`generate`, `depth` and `image`: the three tasks, a result folder for each source."""

from pathlib import Path
from typing import Annotated

import typer

from mf_diffusers.commands.options import DepthFiles, Options, option, shares_options
from mf_diffusers.depth_io import DEPTH_SUFFIXES
from mf_diffusers.pictures import IMAGE_SUFFIXES, read_image


Recursive = Annotated[bool, option("--recursive", help="Look into the folders in folders too.")]


@shares_options
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to show; each gives a result folder.")],
    options: Options,
    num: Annotated[int, option("--num", "-n", min=1, help="Results for each prompt.")] = 1,
    log2_alpha: Annotated[
        float | None, option(min=-30, max=30, help="Above 0 the image settles first, below 0 depth; default: 5.")
    ] = None,
    refine: Annotated[int, option(min=0, help="Steps of a second pass, image to depth, for sharper depth.")] = 0,
) -> None:
    """Make images and their depth from text.

    mf-diffusers generate "a lighthouse at dusk" "a tiled kitchen" --model MODEL --num 2
    """
    from mf_diffusers.commands.batch import Batch

    def inputs(prompt):
        return {"prompt": prompt, "log2_alpha": log2_alpha, "num_refinement_steps": refine}

    sources = [prompt for prompt in prompts for _ in range(num)]
    Batch("generate", options, {"num": num, "log2_alpha": log2_alpha, "refine": refine}).run(sources, inputs)


@shares_options
def depth(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, or folders of pictures.")],
    options: Options,
    prompt: Annotated[str | None, option("--prompt", "-p", help="What the picture shows; can be left out.")] = None,
    ensemble: Annotated[int, option(min=1, help="Samples to take the median of; also gives uncertainty.")] = 1,
    recursive: Recursive = False,
) -> None:
    """Make the depth of images.

    mf-diffusers depth photo.jpg holiday/ --model MODEL --steps 4 --ensemble 5
    """
    from mf_diffusers.commands.batch import Batch
    from mf_diffusers.commands.sources import files_among

    def inputs(path):
        return {"image": read_image(path), "prompt": prompt, "ensemble_size": ensemble}

    sources = files_among(images, IMAGE_SUFFIXES, lambda result: result / "image.png", recursive)
    Batch("depth", options, {"prompt": prompt, "ensemble": ensemble, "recursive": recursive}).run(sources, inputs)


@shares_options
def image(
    depths: Annotated[
        list[Path], typer.Argument(metavar="DEPTH", help="Depth maps (png, npy, npz, exr, tif, pfm), or folders.")
    ],
    prompt: Annotated[str, option("--prompt", "-p", help="What to show.")],
    options: Options,
    depth_files: DepthFiles,
    log2_alpha: Annotated[
        float | None, option(min=-30, max=30, help="From -5, a loose hold of depth, to -14, tight; default: rigid.")
    ] = None,
    recursive: Recursive = False,
) -> None:
    """Make images of depth maps: larger is farther (unless --inverse), 0 is missing, inf infinitely far.

    mf-diffusers image outputs/photo/depth.png --prompt "the same street in snow" --model MODEL
    """
    from mf_diffusers.commands.batch import Batch
    from mf_diffusers.commands.sources import files_among

    def inputs(path):
        return {"depth": depth_files.read(path), "prompt": prompt, "log2_alpha": log2_alpha}

    own = {"prompt": prompt, "log2_alpha": log2_alpha, "recursive": recursive} | depth_files.facts()
    sources = files_among(depths, DEPTH_SUFFIXES, depth_of_result, recursive)
    Batch("image", options, own).run(sources, inputs)


def depth_of_result(result: Path) -> Path:
    """The exact one of the files that hold the valid depth of a result folder alone."""
    return result / "depth.exr" if (result / "depth.exr").is_file() else result / "depth.png"
