"""The boundary of a program, where errors become lines."""

import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .files import ESCAPED


INTERRUPTED = 130  # the exit status of what a signal SIGINT ends, by convention


@contextmanager
def errors_as_lines(options: Mapping[str, str] = {}) -> Iterator[None]:
    """
    Turn expected errors (ValueError, OSError, a Hub that cannot be reached, a finding of a training run) into one line
    on stderr and exit status 1, an interruption into a silent exit. With MF_DIFFUSERS_DEBUG set, errors show where they
    come from. What stdout cannot encode is printed in escapes.

    Args:
        options: names of arguments, as errors have them, and what the program's user calls them.

    Raises:
        SystemExit: in place of what it caught.
    """
    make_printable(sys.stdout)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # Nobody reads on. Without this, Python would complain when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if not is_expected(error) or is_debugging():
            raise
        print(f"error: {with_options(one_line(error), options)}", file=sys.stderr)
        raise SystemExit(1) from error


def is_debugging() -> bool:
    return bool(os.environ.get("MF_DIFFUSERS_DEBUG"))


def is_expected(error: Exception) -> bool:
    """Whether it speaks of what the program was given, and not of the program."""
    return isinstance(error, ValueError | OSError | FloatingPointError) or is_network_error(error)


def is_network_error(error: Exception) -> bool:
    """Whether it comes from below huggingface_hub, whose HTTP client's errors are no OSError."""
    return type(error).__module__.startswith("httpx")


def one_line(error: Exception, source: object = None) -> str:
    """The message of an error in one line, which names the `source` that was read, if any."""
    text = " ".join(str(error).split())
    if is_network_error(error):
        text = f"the Hub cannot be reached, and there is no such file or folder here ({text})"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    elif type(error).__name__ == "OutOfMemoryError":
        text = f"out of GPU memory: try `offload`, or a smaller `height` and `width` ({text})"
    return text if source is None or text.startswith(str(source)) else f"{source}: {text}"


def with_options(text: str, options: Mapping[str, str]) -> str:
    """A message with `name` and name=value of the arguments among `options` as those are called there.

    A flag stands alone: of overwrite=True it is --overwrite.
    """

    def renamed(match: re.Match) -> str:
        quoted, assigned, value = match.groups()
        option = options.get(quoted or assigned)
        if option is None:
            return match[0]
        return option if quoted or value == "True" else f"{option} {value}"

    return re.sub(r"`(\w+)`|\b(\w+)=(True\b|(?=\S))", renamed, text)


def make_printable(stream: io.TextIOBase) -> None:
    """Let a text stream print every name: bytes that are no UTF-8 as they are, what it cannot encode in escapes."""
    if isinstance(stream, io.TextIOWrapper):
        is_utf8 = stream.encoding.lower().replace("-", "") == "utf8"
        stream.reconfigure(errors="surrogateescape" if is_utf8 else ESCAPED["errors"])
