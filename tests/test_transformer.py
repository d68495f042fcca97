import copy

import pytest
import torch
from diffusers import Flux2Transformer2DModel, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny import TINY_TRANSFORMER, randomize

from mf_diffusers import ModalityForcingFlux2Transformer2DModel
from mf_diffusers.modality_forcing.latent_tokens import position_ids
from mf_diffusers.modality_forcing.transformer_flux2 import depth_stream_clones


TINY_BASE = {name: value for name, value in TINY_TRANSFORMER.items() if "depth" not in name} | {
    "guidance_embeds": False
}


def make_inputs(depth: bool = True, batch_size: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(batch_size, 6, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch_size, 5, 48, generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "img_ids": position_ids(rows=2, columns=3),
        "txt_ids": position_ids(length=5),
    }
    if depth:
        inputs["depth_hidden_states"] = torch.randn(batch_size, 6, 16, generator=generator)
        inputs["depth_timestep"] = torch.rand(batch_size, generator=generator)
        inputs["depth_ids"] = position_ids(time=1, rows=2, columns=3)
    return inputs


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() and "timestep" not in name else x for name, x in inputs.items()}


def run(model, inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        output = model(**inputs)
    return output.sample, output.depth_sample


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Flux2Transformer2DModel(**TINY_BASE).eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER)).eval()


# The graft


def test_without_depth_it_is_flux2(base):
    model = ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16).eval()
    with torch.no_grad():
        reference = base(**make_inputs(depth=False)).sample
    sample, depth_sample = run(model, make_inputs(depth=False))
    assert (sample - reference).abs().max() <= 1e-5
    assert depth_sample is None


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graft_keeps_the_base(guidance_embeds, dtype):
    base = Flux2Transformer2DModel(**TINY_BASE | {"guidance_embeds": guidance_embeds}).to(dtype)
    before = copy.deepcopy(base.state_dict())
    model = ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16, num_depth_decoder_layers=2)
    grafted = model.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(grafted[name], tensor) and grafted[name].data_ptr() != tensor.data_ptr()
    clones = depth_stream_clones(grafted)
    assert all(torch.equal(grafted[depth], before[image]) for depth, image in clones.items())
    added = set(grafted) - set(before)
    assert all("depth" in name for name in added)
    assert set(clones) < added
    assert {name for name in added if grafted[name].dtype == torch.float32} >= {"depth_head.proj_out.weight"}
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_graft_starts_at_zero_depth_and_undisturbed_mixing(base):
    model = ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16).eval()
    inputs = make_inputs()
    sample, depth_sample = run(model, inputs)
    assert not depth_sample.any()
    other, _ = run(model, inputs | {"depth_timestep": torch.zeros(2)})
    # The level of the depth stream reaches RGB through the depth tokens alone, not through the mixers.
    assert not torch.equal(sample, other)
    temb = torch.randn(2, 32)
    mixed, _ = model.depth_time_embed(temb, inputs["timestep"], inputs["depth_timestep"])
    assert torch.equal(mixed, temb)


def test_gradients_reach_every_added_weight(base):
    model = randomize(ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16))
    output = model(**make_inputs())
    (output.sample.square().mean() + output.depth_sample.square().mean()).backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters())


def test_a_deeper_decoder_starts_as_it_was_and_learns(model, tmp_path):
    inputs = make_inputs()
    before = run(model, inputs)
    layers = model.config.num_depth_decoder_layers
    model.deepen_depth_decoder(2)
    assert all(torch.equal(*pair) for pair in zip(run(model, inputs), before))
    model(**inputs).depth_sample.square().mean().backward()
    assert all(block.attn.to_out.weight.grad.any() for block in model.depth_decoder_blocks[layers:])
    model.save_pretrained(tmp_path)
    assert len(type(model).from_pretrained(tmp_path).depth_decoder_blocks) == layers + 2


# Streams


def test_modalities_hear_each_other_and_their_levels(model):
    inputs = make_inputs()
    sample, depth_sample = run(model, inputs)
    for name in ("hidden_states", "timestep", "depth_hidden_states", "depth_timestep", "encoder_hidden_states"):
        other_sample, other_depth = run(model, inputs | {name: inputs[name] * 0.5})
        assert not torch.allclose(other_sample, sample) and not torch.allclose(other_depth, depth_sample), name


def test_without_timestep_mixing():
    model = randomize(ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER, depth_timestep_mixing=False))
    assert not any("alpha" in name or "rgb_to_depth" in name for name, _ in model.named_parameters())
    assert run(model, make_inputs())[1].shape == (2, 6, 16)


def test_samples_of_a_batch_do_not_mix(model):
    inputs = make_inputs()
    sample, depth_sample = run(model, inputs)
    one = {name: x[:1] for name, x in inputs.items()}
    assert torch.allclose(run(model, one)[0], sample[:1], atol=1e-5)
    assert torch.allclose(run(model, one)[1], depth_sample[:1], atol=1e-5)


def test_tuple_output(model):
    with torch.no_grad():
        sample, depth_sample = model(**make_inputs(), return_dict=False)
    assert sample.shape == (2, 6, 16) and depth_sample.dtype == torch.float32


# diffusers' features


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = ModalityForcingFlux2Transformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(run(model, make_inputs()), run(again, make_inputs())))


def test_bfloat16_body_with_float32_head(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = ModalityForcingFlux2Transformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.depth_head.parameters()} == {torch.float32}
    inputs = make_inputs()
    sample, depth_sample = run(half, cast(inputs, torch.bfloat16))
    assert sample.dtype == torch.bfloat16 and depth_sample.dtype == torch.float32
    # Not a bfloat16 in disguise: that would show as bands.
    assert not torch.equal(depth_sample, depth_sample.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(**inputs).depth_sample.dtype == torch.float32


def test_from_single_file(model, tmp_path):
    model.save_pretrained(tmp_path / "config")
    model.save_published(tmp_path / "model.safetensors")
    again = ModalityForcingFlux2Transformer2DModel.from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "config"), subfolder=""
    )
    assert all(torch.equal(a, b) for a, b in zip(run(model, make_inputs()), run(again, make_inputs())))


def test_gradient_checkpointing(model):
    def loss_and_gradients():
        model.zero_grad()
        output = model(**make_inputs())
        loss = output.sample.square().mean() + output.depth_sample.square().mean()
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    loss, gradients = loss_and_gradients()
    model.enable_gradient_checkpointing()
    again, again_gradients = loss_and_gradients()
    assert loss == again
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients, again_gradients))


def test_lora_adapter(model):
    before = run(model, make_inputs())
    model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "depth_q_proj", "to_qkv_mlp_proj"], init_lora_weights=False)
    )
    changed = run(model, make_inputs())
    assert not torch.allclose(before[0], changed[0]) and not torch.allclose(before[1], changed[1])
    off = model(**make_inputs(), joint_attention_kwargs={"scale": 0.0})
    assert torch.allclose(off.depth_sample, before[1], atol=1e-6)
    model.delete_adapters("default")
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, make_inputs())))


def test_fused_projections(model):
    before = run(model, make_inputs())
    model.fuse_qkv_projections()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, run(model, make_inputs())))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(model, backend):
    before = run(model, make_inputs())
    model.set_attention_backend(backend)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, run(model, make_inputs())))


def test_regional_compile(model):
    before = run(model, make_inputs())
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, run(model, make_inputs())))


def test_layerwise_casting(model):
    before = run(model, make_inputs())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn.depth_q_proj.weight.dtype == torch.float8_e4m3fn
    assert {parameter.dtype for parameter in model.depth_head.parameters()} == {torch.float32}
    for a, b in zip(before, run(model, make_inputs())):
        assert torch.isfinite(b).all() and not torch.equal(a, b)
        assert (a - b).norm() / a.norm() < 0.2


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(model, offload_type):
    before = run(model, make_inputs())
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, make_inputs())))


# FirstBlockCache and FasterCache raise on FLUX.2 itself in diffusers 0.42, PyramidAttentionBroadcast and SeaCache do
# nothing there: these two are the caches that work on FLUX.2.
@pytest.mark.parametrize(
    "config",
    [
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
        MagCacheConfig(threshold=1e6, num_inference_steps=4, retention_ratio=0.25, mag_ratios=torch.ones(4)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_caches(model, config):
    """A cache that skips gives what it remembers, in both streams; switched off, the model is as before."""
    inputs = make_inputs()
    later = inputs | {"hidden_states": inputs["hidden_states"] * 0.9, "timestep": inputs["timestep"] * 0.9}
    exact = run(model, later)
    model.enable_cache(config)
    for call in (inputs, inputs, later, later):
        with model.cache_context("cond"):
            cached = run(model, call)
    assert all(torch.isfinite(x).all() for x in cached)
    assert not torch.equal(cached[0], exact[0]) and not torch.equal(cached[1], exact[1])
    model.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(exact, run(model, later)))
