"""What the user sees besides results: errors and warnings as lines."""

import sys
import warnings
from contextlib import contextmanager

from typer.core import TyperGroup

from mf_diffusers.commands.options import FLAGS
from mf_diffusers.errors import errors_as_lines, with_options
from mf_diffusers.input_warning import InputWarning


class Commands(TyperGroup):
    """Commands whose expected errors are one line on stderr, with flags in the place of the library's arguments."""

    def invoke(self, ctx):
        with errors_as_lines(FLAGS):
            return super().invoke(ctx)


@contextmanager
def warnings_as_lines(quiet: bool):
    """Print this package's warnings as lines on stderr, and no others; when `quiet`, of these `InputWarning` alone."""
    shown = (InputWarning,) if quiet else (InputWarning, UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = lambda message, category, *_: (
            print(f"warning: {with_options(str(message), FLAGS)}", file=sys.stderr) if category in shown else None
        )
        yield
