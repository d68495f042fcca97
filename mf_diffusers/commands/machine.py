"""Where the model runs, and how much the libraries below say of it."""

import diffusers
import torch
import transformers

from mf_diffusers.precision import choose_dtype


def device_and_dtype(device: str, dtype: str, offload: str) -> tuple[str, torch.dtype]:
    """The torch device and dtype of an answer that may be "auto".

    Warns with UserWarning when the device emulates the dtype that is asked for.
    """

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [name for name in there if there[name]]
    if device == "auto":
        device = usable[0]
    elif device.split(":")[0] not in usable:
        raise ValueError(f"device={device}: torch sees {', '.join(usable)} on this machine; choose among these.")
    if device == "cpu" and offload != "none":
        raise ValueError(f"offload={offload} needs a GPU, but the device is the CPU: leave it out.")
    return device, choose_dtype(device, None if dtype == "auto" else getattr(torch, dtype))


def hush_libraries(*, errors_alone: bool) -> None:
    """Hide the progress bars of diffusers and transformers, and with `errors_alone` their warnings too."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        if errors_alone:
            library.utils.logging.set_verbosity_error()
