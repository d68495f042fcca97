"""`demo`: all three tasks with the embedded model."""

from pathlib import Path
from typing import Annotated

from mf_diffusers.commands.options import (
    Adapter,
    AnyBase,
    Device,
    Dtype,
    Lora,
    LoraWeight,
    Offline,
    Offload,
    Overwrite,
    Quiet,
    TextEncoder,
    option,
)


def demo(
    model: Annotated[
        str | None, option("--model", "-m", help="Folder or Hub id; default: the embedded model, where there is one.")
    ] = None,
    steps: Annotated[int | None, option(min=1, help="Euler steps for images; default: the model's.")] = None,
    seed: Annotated[
        int, option(min=0, max=2**32, help="Result number i of a task, from 0, has the seed SEED + i.")
    ] = 0,
    lora: Lora = None,
    lora_weight: LoraWeight = 1.0,
    adapter: Adapter = None,
    any_base: AnyBase = False,
    text_encoder: TextEncoder = None,
    output: Annotated[Path, option("--output", "-o", panel="Result", help="The folder to write.")] = Path(
        "outputs/demo"
    ),
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    offline: Offline = False,
    quiet: Quiet = False,
) -> None:
    """Show all three tasks on a few prompts and on six scenes of this package, and make a sheet of them.

    mf-diffusers demo --model MODEL --output outputs/demo
    """
    import torch

    from mf_diffusers.commands.machine import device_and_dtype, hush_libraries
    from mf_diffusers.demo import run_demo

    hush_libraries(errors_alone=quiet)  # the demo has a progress bar of its own
    device, dtype = device_and_dtype(device, dtype, offload)
    if model is None:
        torch.set_num_threads(1)  # its tensors are small: beside other work, threads would only wait for one another
    run_demo(
        model,
        output,
        seed,
        steps,
        device,
        dtype,
        overwrite,
        quiet,
        lora=lora,
        lora_weight=lora_weight,
        adapter=adapter,
        any_base=any_base,
        text_encoder=text_encoder,
        offload=offload,
        offline=offline,
    )
