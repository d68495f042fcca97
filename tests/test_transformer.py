import copy
from functools import partial

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from tiny import TINY_TRANSFORMER, predict, randomize, transformer_inputs

from mf_diffusers import ModalityForcingFlux2Transformer2DModel
from mf_diffusers.modality_forcing.transformer_flux2 import depth_stream_clones


make_inputs = partial(transformer_inputs, 48)


TINY_BASE = {name: value for name, value in TINY_TRANSFORMER.items() if "depth" not in name} | {
    "guidance_embeds": False
}


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
    sample, depth_sample = predict(model, make_inputs(depth=False))
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
    sample, depth_sample = predict(model, inputs)
    assert not depth_sample.any()
    other, _ = predict(model, inputs | {"depth_timestep": torch.zeros(2)})
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
    before = predict(model, inputs)
    layers = model.config.num_depth_decoder_layers
    model.deepen_depth_decoder(2)
    assert all(torch.equal(*pair) for pair in zip(predict(model, inputs), before))
    model(**inputs).depth_sample.square().mean().backward()
    assert all(block.attn.to_out.weight.grad.any() for block in model.depth_decoder_blocks[layers:])
    model.save_pretrained(tmp_path)
    assert len(type(model).from_pretrained(tmp_path).depth_decoder_blocks) == layers + 2


# Streams


def test_modalities_hear_each_other_and_their_levels(model):
    inputs = make_inputs()
    sample, depth_sample = predict(model, inputs)
    for name in ("hidden_states", "timestep", "depth_hidden_states", "depth_timestep", "encoder_hidden_states"):
        other_sample, other_depth = predict(model, inputs | {name: inputs[name] * 0.5})
        assert not torch.allclose(other_sample, sample) and not torch.allclose(other_depth, depth_sample), name


# diffusers' features


def test_from_single_file(model, tmp_path):
    model.save_pretrained(tmp_path / "config")
    model.save_published(tmp_path / "model.safetensors")
    again = ModalityForcingFlux2Transformer2DModel.from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "config"), subfolder=""
    )
    assert all(torch.equal(a, b) for a, b in zip(predict(model, make_inputs()), predict(again, make_inputs())))


def test_fused_projections(model):
    before = predict(model, make_inputs())
    model.fuse_qkv_projections()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, predict(model, make_inputs())))
