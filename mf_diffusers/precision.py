"""In which floating point type a device is to compute."""

import platform
import time
import warnings

import torch


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types that the models compute in, by the names that settings of training have for them; float16 overflows."""

PRODUCT = 256
"""Side of the matrices whose product `bfloat16_cost` measures."""


def computes_in_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for bfloat16, and does not emulate them.

    GPUs have, but for Apple's, of which it depends on the system; of CPUs those with AVX512_BF16, AMX or Arm's BF16. On
    a CPU the products are oneDNN's, so its ONEDNN_MAX_CPU_ISA counts, and torch's ATEN_CPU_CAPABILITY does not.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return kind != "mps"
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # oneDNN's answer is yes from AVX-512 on; without one of these it converts to float32 and back.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(device: torch.device | str, asked: torch.dtype | None = None) -> torch.dtype:
    """The type to compute in: what is asked for; for None bfloat16 where the device computes in it, else float32.

    Warns with UserWarning when bfloat16 is asked for and the device emulates it.
    """
    if asked is None:
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    if asked == torch.bfloat16 and not computes_in_bfloat16(device):
        warnings.warn(
            f"this {torch.device(device).type} has no instructions for bfloat16 and emulates it: a product takes "
            f"{bfloat16_cost(device):.0f} times as long as in float32, which is the better choice here",
            UserWarning,
            stacklevel=2,
        )
    return asked


def bfloat16_cost(device: torch.device | str) -> float:
    """How many times as long as in float32 a matrix product takes in bfloat16, measured within a second."""
    seconds = {}
    for dtype in DTYPES.values():
        matrix = torch.ones(PRODUCT, PRODUCT, dtype=dtype, device=device)
        seconds[dtype] = min(_seconds_of_product(matrix) for _ in range(3))
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _seconds_of_product(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    (matrix @ matrix).sum().item()  # waits for the device
    return time.perf_counter() - started
