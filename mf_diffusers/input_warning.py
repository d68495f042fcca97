"""The warning that is always shown."""


class InputWarning(UserWarning):
    """Part of an input was repaired, left out, or is most likely not what it is taken for.

    The command line prints these with `--quiet` too, where it holds back other warnings.
    """
