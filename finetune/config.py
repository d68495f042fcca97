"""Settings: dataclasses, filled from a YAML file and `key=value` overrides."""

import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mf_diffusers.files import atomic_write


Config = TypeVar("Config")


def load_config(cls: type[Config], arguments: list[str] | None = None) -> Config:
    """
    Args:
        cls: a dataclass; its fields are the settings, their types are enforced.
        arguments: `--config FILE [key=value ...]`; default: the command line.

    Returns:
        An instance of `cls`.

    Raises:
        SystemExit: with one line that names the key and what is wrong with it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage = f"usage: {Path(sys.argv[0]).name} --config FILE.yaml [key=value ...]"
    if "--config" not in arguments or arguments[-1] == "--config":
        raise SystemExit(usage)
    position = arguments.index("--config")
    path = Path(arguments[position + 1])
    overrides = arguments[:position] + arguments[position + 2 :]
    if not path.is_file():
        raise SystemExit(f"error: no settings at {path}")
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise SystemExit(f"error: {wrong[0]!r} is no key=value\n{usage}")
    try:
        settings = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(cls))
        key = error.full_key or "the file"
        raise SystemExit(f"error: {path}: {key}: {str(error).splitlines()[0]}\nknown at the top: {known}") from error


def check_names(setting: str, names: Iterable[str], known: Container[str]) -> None:
    """Stops at the first name in the mapping `setting` that is not known there."""
    for name in names:
        if name not in known:
            raise SystemExit(f"error: {setting}.{name} is no setting: is it misspelt?")


def arguments_of(constructor: Callable) -> set[str]:
    """The names of a constructor's arguments."""
    return set(signature(constructor).parameters)


def take_flag(flag: str) -> bool:
    """Whether a flag is on the command line, from which it is removed: `load_config` knows settings only."""
    found = flag in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != flag]
    return found


def save_config(config: Any, path: Path) -> None:
    """Writes the settings as YAML that `load_config` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
