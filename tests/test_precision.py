"""What is computed in bfloat16, and where float32 is the better choice."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from finetune.training.trainer import TrainerConfig, training_device
from mf_diffusers.commands.machine import device_and_dtype
from mf_diffusers.precision import DTYPES, bfloat16_cost, choose_dtype, computes_in_bfloat16


EMULATES = """
import torch, warnings
from finetune.training.trainer import TrainerConfig, training_device
from mf_diffusers.precision import choose_dtype, computes_in_bfloat16
warnings.simplefilter("ignore")
print(computes_in_bfloat16("cpu"), choose_dtype("cpu"), choose_dtype("cpu", torch.bfloat16))
print(TrainerConfig().mixed_precision, TrainerConfig(mixed_precision="bf16").mixed_precision)
warnings.simplefilter("error")
choose_dtype("cpu", torch.bfloat16)
"""


def test_the_choice_fits_the_device():
    assert choose_dtype("cpu") == (torch.bfloat16 if computes_in_bfloat16("cpu") else torch.float32)
    assert choose_dtype("cuda") == torch.bfloat16
    assert choose_dtype("mps") == torch.float32
    assert device_and_dtype("cpu", "auto", "none") == ("cpu", choose_dtype("cpu"))
    assert DTYPES[TrainerConfig().mixed_precision] == choose_dtype(training_device())


def test_what_is_asked_for_is_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float32, torch.bfloat16):
            assert choose_dtype("cpu", dtype) == dtype
    assert TrainerConfig(mixed_precision="fp32").mixed_precision == "fp32"


def test_a_cpu_without_bfloat16_takes_float32_and_warns_of_the_cost():
    # oneDNN, which computes the products, does without newer instructions when it is told so.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", EMULATES], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["False", "torch.float32", "torch.bfloat16", "fp32", "bf16"]
    assert "emulates it: a product takes" in done.stderr


@pytest.mark.skipif(not computes_in_bfloat16("cpu"), reason="this CPU emulates bfloat16")
def test_bfloat16_costs_little_where_it_is_not_emulated():
    assert bfloat16_cost("cpu") < 10  # about one half; where it is emulated, about a hundred
