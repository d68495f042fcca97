"""What the user sees besides results: errors and warnings as lines."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from typer.core import TyperCommand

from mf_diffusers.commands.options import FLAGS
from mf_diffusers.errors import errors_as_lines, with_options
from mf_diffusers.input_warning import InputWarning


class Command(TyperCommand):
    """A command whose expected errors and warnings are lines on stderr, with flags in the place of the library's
    arguments."""

    def invoke(self, ctx):
        with errors_as_lines(FLAGS), warnings_as_lines(ctx.params.get("quiet", False)):
            return super().invoke(ctx)


@contextmanager
def warnings_as_lines(quiet: bool) -> Iterator[None]:
    """Print this package's warnings as lines on stderr, and no others; when `quiet`, of these `InputWarning` alone."""
    shown = (InputWarning,) if quiet else (InputWarning, UserWarning)

    def show(message, category, *_):
        if category in shown:
            print(f"warning: {with_options(str(message), FLAGS)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = show
        yield
