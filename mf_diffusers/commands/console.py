"""What the user sees besides results: errors and warnings as lines."""

import sys
import warnings
from contextlib import contextmanager

from typer.core import TyperGroup

from mf_diffusers.commands.options import FLAGS
from mf_diffusers.errors import errors_as_lines


class Commands(TyperGroup):
    """Commands whose expected errors are one line on stderr, with flags in the place of the library's arguments."""

    def invoke(self, ctx):
        with errors_as_lines(FLAGS):
            return super().invoke(ctx)


@contextmanager
def warnings_as_lines(quiet: bool):
    """Print this package's warnings (UserWarning itself) as lines on stderr, and no others; none when `quiet`."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: (
            None if quiet or category is not UserWarning else print(f"warning: {message}", file=sys.stderr)
        )
        yield
