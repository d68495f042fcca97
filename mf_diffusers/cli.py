"""The command line: text, images and depth maps in, result folders out; checkpoints converted and described."""

from typing import Annotated

import typer

from mf_diffusers import __version__
from mf_diffusers.commands.checkpoints import convert, info
from mf_diffusers.commands.console import Command
from mf_diffusers.commands.datasets import prepare
from mf_diffusers.commands.demonstration import demo
from mf_diffusers.commands.editing import complete, inpaint
from mf_diffusers.commands.evaluation import compare, evaluate
from mf_diffusers.commands.results import depth, generate, image


app = typer.Typer(
    help="Modality Forcing: images and depth from one diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, depth, image, inpaint, complete, demo, convert, info, evaluate, compare, prepare):
    app.command(cls=Command)(command)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mf-diffusers {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Modality Forcing: images and depth from one diffusion transformer."""


if __name__ == "__main__":
    app()
