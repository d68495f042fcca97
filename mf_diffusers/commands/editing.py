"""`inpaint` and `complete`: what is given in part is kept, and the rest of it is made."""

from pathlib import Path
from typing import Annotated

import typer

from mf_diffusers.commands.options import DepthFiles, Options, Strength, option, shares_options
from mf_diffusers.pictures import read_image, read_oriented, turned_along


@shares_options
def inpaint(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to make anew in part.")],
    prompt: Annotated[str, option("--prompt", "-p", help="What the new picture shows.")],
    options: Options,
    depth_files: DepthFiles,
    mask: Annotated[Path | None, option(help="Picture of the same size, white where IMAGE is made anew.")] = None,
    depth: Annotated[Path | None, option(help="Depth map of the same size, which the new picture follows.")] = None,
    strength: Strength = None,
    log2_alpha: Annotated[
        float | None,
        option(min=-30, max=30, help="With --depth: -5 is a loose hold of it, -14 a tight one; default: rigid."),
    ] = None,
) -> None:
    """Make a part of a picture anew, or another version of it, with its depth.

    mf-diffusers inpaint room.png --mask sofa.png --prompt "a green armchair" --model MODEL
    """
    from mf_diffusers.commands.batch import Batch
    from mf_diffusers.commands.sources import InputFile

    if mask is None and strength is None:
        raise ValueError("what is to change? Give a `mask_image`, a `strength`, or both.")

    def inputs(path):
        image, orientation = read_oriented(path)
        given = {"image": image, "prompt": prompt, "strength": strength, "log2_alpha": log2_alpha}
        if mask is not None:
            given["mask_image"] = read_image(mask)
        if depth is not None:
            given["depth"] = turned_along(depth_files.read(depth), image, orientation)
        return given

    own = {"prompt": prompt, "mask": mask, "depth": depth, "strength": strength, "log2_alpha": log2_alpha}
    own |= depth_files.facts()
    Batch("inpaint", options, own).run([InputFile(picture, picture.stem)], inputs)


@shares_options
def complete(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    sparse: Annotated[Path, typer.Argument(metavar="DEPTH", help="Its depth map of the same size, 0 where missing.")],
    options: Options,
    depth_files: DepthFiles,
    prompt: Annotated[str | None, option("--prompt", "-p", help="What the picture shows; can be left out.")] = None,
    ensemble: Annotated[int, option(min=1, help="Samples to take the median of; also gives uncertainty.")] = 1,
) -> None:
    """Complete a depth map that is known in part: points of a LiDAR, a sensor's with holes. The unit stays.

    mf-diffusers complete street.png lidar.png --model MODEL
    """
    from mf_diffusers.commands.batch import Batch
    from mf_diffusers.commands.sources import InputFile

    def inputs(path):
        image, orientation = read_oriented(path)
        known = turned_along(depth_files.read(sparse), image, orientation)
        return {"image": image, "depth": known, "prompt": prompt, "ensemble_size": ensemble}

    own = {"depth": sparse, "prompt": prompt, "ensemble": ensemble} | depth_files.facts()
    Batch("complete", options, own).run([InputFile(picture, picture.stem)], inputs)
