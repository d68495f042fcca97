"""What every transformer of the table of backbones does: diffusers' features, on a tiny instance of each."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny import TINY_DEPTH_DIT, TINY_TRANSFORMER, close, predict, randomize, transformer_inputs
from tiny_z_image import TINY_Z_IMAGE

from mf_diffusers.modality_forcing.backbones import BACKBONES


TINY_DEPTH = {"depth_channels": 16, "num_depth_decoder_layers": 2}


@dataclass
class Case:
    """
    Args:
        family: in `BACKBONES`.
        config: of a tiny instance.
        text_channels: width of its text features.
        lora_targets: some of its layers, in each kind of block.
        cast_weight: one of those that layerwise casting stores in 8 bits.
        taylor_seer: settings that TaylorSeer needs to find something to cache.
        sample_dtype: of the RGB velocity of a body in bfloat16.
    """

    family: str
    config: dict[str, Any]
    text_channels: int
    lora_targets: list[str]
    cast_weight: str
    taylor_seer: dict[str, Any] = field(default_factory=dict)
    sample_dtype: torch.dtype = torch.bfloat16


Z_IMAGE = {
    "family": "z_image",
    "text_channels": 16,
    "lora_targets": ["to_q", "to_out.0", "w2"],
    "cast_weight": "layers.0.attention.to_q",
    "taylor_seer": {"cache_identifiers": [r"layers\.\d+\.(attention|feed_forward)"]},  # its default finds nothing here
}
CASES = {
    "flux2": Case(
        "flux2",
        TINY_TRANSFORMER,
        text_channels=48,
        lora_targets=["to_q", "depth_q_proj", "to_qkv_mlp_proj"],
        cast_weight="transformer_blocks.0.attn.depth_q_proj",
    ),
    "z_image": Case(config=TINY_Z_IMAGE | TINY_DEPTH, **Z_IMAGE),
    "z_image, own modulation": Case(config=TINY_Z_IMAGE | TINY_DEPTH | {"own_depth_modulation": True}, **Z_IMAGE),
    "dit": Case(
        "dit",
        TINY_DEPTH_DIT,
        text_channels=24,
        lora_targets=["to_qkv_mlp_proj", "to_out"],
        cast_weight="transformer_blocks.0.attn.to_out",
        sample_dtype=torch.float32,
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def model(case) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomize(BACKBONES[case.family].transformer_class(**case.config)).eval()


@pytest.fixture
def inputs(case) -> dict[str, torch.Tensor]:
    return transformer_inputs(case.text_channels)


def test_every_family_is_here():
    assert {case.family for case in CASES.values()} == BACKBONES.keys()


def test_without_timestep_mixing(case, inputs):
    model = BACKBONES[case.family].transformer_class(**case.config, depth_timestep_mixing=False)
    assert not any("alpha" in name or "rgb_to_depth" in name for name, _ in model.named_parameters())
    assert predict(randomize(model), inputs)[1].shape == (2, 6, 16)


def test_samples_of_a_batch_do_not_mix(model, inputs):
    sample, depth_sample = predict(model, inputs)
    one = {name: x[:1] for name, x in inputs.items()}
    assert close(predict(model, one), (sample[:1], depth_sample[:1]), atol=1e-5)


def test_tuple_output(model, inputs):
    with torch.no_grad():
        sample, depth_sample = model(**inputs, return_dict=False)
    assert sample.shape == (2, 6, 16) and depth_sample.dtype == torch.float32


def test_save_and_load(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(predict(model, inputs), predict(again, inputs)))


def test_bfloat16_body_with_float32_head(case, model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.depth_head.parameters()} == {torch.float32}
    halved = {
        name: x.bfloat16() if x.is_floating_point() and "timestep" not in name else x for name, x in inputs.items()
    }
    sample, depth_sample = predict(half, halved)
    assert sample.dtype == case.sample_dtype and depth_sample.dtype == torch.float32
    # Not a bfloat16 in disguise: that would show as bands.
    assert not torch.equal(depth_sample, depth_sample.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert predict(model, inputs)[1].dtype == torch.float32


def test_gradient_checkpointing(model, inputs):
    def loss_and_gradients():
        model.zero_grad()
        output = model(**inputs)
        loss = output.sample.square().mean() + output.depth_sample.square().mean()
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    loss, gradients = loss_and_gradients()
    model.enable_gradient_checkpointing()
    again, again_gradients = loss_and_gradients()
    assert loss == again
    assert close(gradients, again_gradients, atol=1e-7)


def test_regional_compile(model, inputs):
    before = predict(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert close(before, predict(model, inputs), atol=1e-5)


def test_lora_adapter(case, model, inputs):
    before = predict(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=case.lora_targets, init_lora_weights=False))
    changed = predict(model, inputs)
    assert not torch.allclose(before[0], changed[0]) and not torch.allclose(before[1], changed[1])
    off = predict(model, inputs | {"joint_attention_kwargs": {"scale": 0.0}})
    assert torch.allclose(off[1], before[1], atol=1e-6)
    model.delete_adapters("default")
    assert all(torch.equal(a, b) for a, b in zip(before, predict(model, inputs)))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(model, inputs, backend):
    before = predict(model, inputs)
    model.set_attention_backend(backend)
    assert close(before, predict(model, inputs), atol=1e-5)


def test_layerwise_casting(case, model, inputs):
    before = predict(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.get_submodule(case.cast_weight).weight.dtype == torch.float8_e4m3fn
    assert {parameter.dtype for parameter in model.depth_head.parameters()} == {torch.float32}
    for a, b in zip(before, predict(model, inputs)):
        assert torch.isfinite(b).all() and not torch.equal(a, b)
        assert (a - b).norm() / a.norm() < 0.2


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(model, inputs, offload_type):
    before = predict(model, inputs)
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, predict(model, inputs)))


# FirstBlockCache and FasterCache raise on FLUX.2 itself in diffusers 0.42, PyramidAttentionBroadcast and SeaCache do
# nothing there: these two are the caches that work on FLUX.2. Z-Image itself has none.
@pytest.mark.parametrize("cache", ["TaylorSeer", "MagCache"])
def test_caches(case, model, inputs, cache):
    """A cache that skips gives what it remembers, in both streams; switched off, the model is as before."""
    later = inputs | {"hidden_states": inputs["hidden_states"] * 0.9, "timestep": inputs["timestep"] * 0.9}
    exact = predict(model, later)
    config = {
        "TaylorSeer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, **case.taylor_seer),
        "MagCache": MagCacheConfig(
            threshold=1e6, num_inference_steps=4, retention_ratio=0.25, mag_ratios=torch.ones(4)
        ),
    }[cache]
    model.enable_cache(config)
    for call in (inputs, inputs, later, later):
        with model.cache_context("cond"):
            cached = predict(model, call)
    assert all(torch.isfinite(x).all() for x in cached)
    assert not torch.equal(cached[0], exact[0]) and not torch.equal(cached[1], exact[1])
    model.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(exact, predict(model, later)))
