"""`convert` and `info`: checkpoints from one layout to the other, and what one is."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from mf_diffusers.commands.options import DTYPES, Offline, option


LICENCE_NOTE = "The authors' published weights are licensed CC BY-NC 4.0 (not for commercial use), converted or not."


def convert(
    src: Annotated[str, typer.Argument(help="Published layout (folder or .safetensors), or a diffusers folder.")],
    dst: Annotated[Path, typer.Argument(help="A folder for diffusers, or NAME.safetensors in the published layout.")],
    text_encoder: Annotated[
        str | None, option(help="To save in the pipeline, folder or Hub id; default: none.")
    ] = None,
    prefix: Annotated[str, option(help='Of the keys in NAME.safetensors; in the authors\' file "dit.".')] = "",
    dtype: Annotated[str, option(**DTYPES, help="auto: as stored.")] = "auto",
    overwrite: Annotated[bool, option("--overwrite", help="Replace DST.")] = False,
    offline: Offline = False,
) -> None:
    """Convert weights between the published layout and diffusers, both ways.

    A published folder with the autoencoder becomes a pipeline, one without it or a file a transformer.

    mf-diffusers convert modality_forcing/ klein-depth/

    mf-diffusers convert klein-depth/ klein-depth.safetensors
    """
    from mf_diffusers.checkpoints import convert_checkpoint

    what, parameters = convert_checkpoint(src, dst, text_encoder, prefix, dtype, overwrite, offline)
    size = sum(file.stat().st_size for file in (dst.rglob("*") if dst.is_dir() else [dst]) if file.is_file())
    typer.echo(f"{dst}: {what}, {parameters:,} parameters in the transformer, {decimal(size)} on disk")
    typer.echo(LICENCE_NOTE)


def info(
    model: Annotated[str, typer.Argument(help="Folder, .safetensors file or Hub id.")],
    as_json: Annotated[bool, option("--json", help="For machines.")] = False,
    offline: Offline = False,
) -> None:
    """Describe a checkpoint without loading its weights.

    mf-diffusers info klein-depth/ --json
    """
    from mf_diffusers.checkpoints import read_checkpoint
    from mf_diffusers.modality_forcing.backbones import BACKBONES, family_of

    checkpoint = read_checkpoint(model, offline)
    transformer = checkpoint.parts["transformer"]
    config, shape = transformer.config, transformer.cls.shape_of(transformer.config)
    parts = {name: part.weights for name, part in checkpoint.parts.items() if part.weights}
    parameters = {part: sum(tensor.numel() for tensor in tensors.values()) for part, tensors in parts.items()}
    named = {test: [t for name, t in parts["transformer"].items() if test in name] for test in ("depth", "depth_head.")}
    added, head = (sum(tensor.numel() for tensor in tensors) for tensors in named.values())
    report = {
        "model": model,
        "kind": checkpoint.kind,
        "transformer": config,
        "width": shape.width,
        "parameters": parameters,
        "parameters_added_by_depth": added,
        "dtypes": {part: sorted({str(t.dtype)[6:] for t in tensors.values()}) for part, tensors in parts.items()},
        "fitting_text_encoder": BACKBONES[family_of(transformer.cls.__name__)].text_encoders.get(shape.text_channels),
        **checkpoint.facts,
        "bytes_of_bfloat16_weights": 2 * (sum(parameters.values()) + head),  # the depth head stays float32
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        for label, entry in value.items() if isinstance(value, dict) else [("", value)]:
            if name.startswith("bytes"):
                entry = decimal(entry)
            elif type(entry) in (int, float):
                entry = f"{entry:,.10g}"
            typer.echo(f"{f'{name} {label}'.replace('_', ' '):44}{entry}")
    uncounted = "activations are" if "text_encoder" in parts else "activations and the text encoder are"
    typer.echo(f"Inference takes more memory than these weights: {uncounted} not counted.")
