"""What the user sees besides results: errors and warnings as lines."""

import os
import sys
import warnings
from contextlib import contextmanager

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """Commands whose expected errors are one line on stderr; MF_DIFFUSERS_DEBUG=1 shows where they come from."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Exception as error:
            expected = isinstance(error, (ValueError, OSError)) or is_network_error(error)
            expected = expected and not isinstance(error, BrokenPipeError)  # which click ends quietly
            if not expected or debugging():
                raise
            typer.echo(f"error: {reason(error)}", err=True)
            raise typer.Exit(1) from error


def debugging() -> bool:
    return bool(os.environ.get("MF_DIFFUSERS_DEBUG"))


def reason(error: Exception, source=None) -> str:
    """The message of an error in one line, which names the source."""
    text = " ".join(str(error).split())
    if is_network_error(error):
        text = f"the Hub cannot be reached, and there is no such file or folder here ({text})"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif type(error).__name__ == "OutOfMemoryError":
        text = f"out of GPU memory: try --offload model, or a smaller --height and --width ({text})"
    return text if source is None or text.startswith(str(source)) else f"{source}: {text}"


def is_network_error(error: Exception) -> bool:
    """Whether it comes from below huggingface_hub, whose HTTP client's errors are no OSError."""
    return type(error).__module__.startswith("httpx")


@contextmanager
def warnings_as_lines(quiet: bool):
    """Print this package's warnings (UserWarning itself) as lines on stderr, and no others; none when `quiet`."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: (
            None if quiet or category is not UserWarning else print(f"warning: {message}", file=sys.stderr)
        )
        yield
