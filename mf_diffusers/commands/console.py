"""What the user sees besides results: errors and warnings as lines."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from mf_diffusers.commands.options import ARGUMENTS, FLAGS, METADATA_KEYS
from mf_diffusers.errors import errors_as_lines, with_options
from mf_diffusers.input_warning import InputWarning


class Command(TyperCommand):
    """A command whose expected errors and warnings are lines on stderr, with flags in the place of the library's
    arguments."""

    def invoke(self, ctx: typer.Context) -> Any:
        own = {name for parameter in self.params for name in parameter.opts}
        names = METADATA_KEYS | {name: flag for name, flag in FLAGS.items() if flag in own or flag in ARGUMENTS}
        with errors_as_lines(names), warnings_as_lines(ctx.params.get("quiet", False), names):
            return super().invoke(ctx)


@contextmanager
def warnings_as_lines(quiet: bool, names: Mapping[str, str]) -> Iterator[None]:
    """Print this package's warnings as lines on stderr, and no others; when `quiet`, of these `InputWarning` alone.

    Args:
        names: see `errors_as_lines`.
    """
    shown = (InputWarning,) if quiet else (InputWarning, UserWarning)

    def show(message, category, *_):
        if category in shown:
            print(f"warning: {with_options(str(message), names)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", InputWarning)  # once, even where a file is read again
        warnings.showwarning = show
        yield
