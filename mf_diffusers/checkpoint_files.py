"""The files of a checkpoint, in a folder or on the Hub: their sizes, JSON, and headers of weights, but no weights."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfFileSystem, constants

from mf_diffusers.hub import hub_errors, repository_folder


# Names of dtypes in the headers of safetensors files.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_JSON = 16 * 2**20  # bytes; more is no config
LONGEST_HEADER = 100 * 10**6  # bytes, the limit of safetensors itself

EmptyWeights = dict[str, torch.Tensor]
"""Weights by name as tensors on the meta device: shapes and dtypes, no memory."""


class CheckpointFiles:
    """
    The files of a checkpoint and of its folders, by path within it.

    Args:
        name: folder, safetensors file (which is then its `model.safetensors`), or Hub id.
        offline: ask no server; of a Hub id, what lies on this machine.

    Raises:
        FileNotFoundError, PermissionError: there is no such folder or repository, or it is gated.
    """

    def __init__(self, name: str | Path, offline: bool = False):
        self.name, self._open = str(name), partial(open, mode="rb")
        if Path(name).is_file():
            self.paths, self.sizes = {"model.safetensors": self.name}, {"model.safetensors": Path(name).stat().st_size}
        elif Path(name).is_dir() or offline or constants.HF_HUB_OFFLINE:
            root = repository_folder(name, ["*"], local_files_only=True)
            self.paths = _files(root)
            self.sizes = {file: path.stat().st_size for file, path in self.paths.items()}
        else:
            system = HfFileSystem()
            self._open = partial(system.open, mode="rb")
            with hub_errors(name):
                found = system.find(self.name, maxdepth=2, detail=True)
            self.paths = {path.removeprefix(f"{name}/"): path for path in found}
            self.sizes = {path.removeprefix(f"{name}/"): entry["size"] for path, entry in found.items()}

    def __contains__(self, file: str) -> bool:
        return file in self.sizes

    def path(self, file: str) -> str:
        """The path of a file, as messages name it."""
        return self.name if self.paths.get(file) == self.name else f"{self.name.rstrip('/')}/{file}"

    def folder(self, part: str) -> list[str]:
        """The names of the files in a folder; "" is the checkpoint's own."""
        prefix = f"{part}/" if part else ""
        names = [file.removeprefix(prefix) for file in self.sizes if file.startswith(prefix)]
        return sorted(name for name in names if "/" not in name)

    def read_json(self, file: str) -> dict[str, Any]:
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or no object.
        """
        if file not in self:
            raise FileNotFoundError(f"{self.path(file)} is missing.")
        if self.sizes[file] > LONGEST_JSON:
            raise ValueError(f"{self.path(file)} is no config: it has {self.sizes[file]:,} bytes.")
        with self._open(self.paths[file]) as opened:
            text = opened.read()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path(file)} is damaged or no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.path(file)} must hold names with values, but it is {str(content)[:50]!r}.")
        return content

    def read_weights(self, file: str) -> EmptyWeights:
        """
        What a safetensors file holds, by its header.

        Raises:
            ValueError: it is truncated, or no safetensors file.
        """
        path, size = self.path(file), self.sizes[file]
        with self._open(self.paths[file]) as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ValueError(f"{path} is not a complete safetensors file: download it again.")
            try:
                header = json.loads(opened.read(length))
                header.pop("__metadata__", None)
                tensors = {key: _empty_tensor(entry) for key, entry in header.items()}
                end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} is not a safetensors file, by its header: {error!r}.") from error
        if 8 + length + end != size:
            raise ValueError(
                f"{path} is not a complete safetensors file: it has {size:,} bytes in place of {8 + length + end:,}. "
                "Download it again."
            )
        return tensors


def _files(root: Path) -> dict[str, Path]:
    """Those of a folder and its folders; links are followed, for the Hub's cache consists of them."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return {path.relative_to(root).as_posix(): path for path in files}


def _empty_tensor(entry: dict) -> torch.Tensor:
    """Raises ValueError, TypeError or KeyError where an entry of a header is not one."""
    dtype, shape, (start, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"shape {shape}")
    if math.prod(shape) * dtype.itemsize != end - start or start < 0:
        raise ValueError(f"shape {shape} of {dtype} in {end - start} bytes")
    return torch.empty(shape, dtype=dtype, device="meta")
