"""Z-Image with depth: the transformer."""

import copy
from functools import partial

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from tiny import close, predict, randomize, transformer_inputs
from tiny_z_image import TINY_Z_IMAGE

from mf_diffusers import ModalityForcingZImageTransformer2DModel
from mf_diffusers.modality_forcing.latent_tokens import pack_cells, position_ids
from mf_diffusers.modality_forcing.transformer_z_image import depth_clones


make_inputs = partial(transformer_inputs, 16)


TINY_DEPTH = {"depth_channels": 16, "num_depth_decoder_layers": 2}
SIZES = [(4, 6), (8, 8), (12, 4)]  # latents; none of them makes a multiple of 32 tokens
LENGTHS = [5, 40, 32]  # tokens of text


def make_mixed_inputs(depth: bool = True) -> tuple[dict, tuple]:
    """Three samples of several sizes and texts, as this package takes them and, without depth, as Z-Image does."""
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(4, height, width, generator=generator) for height, width in SIZES]
    texts = [torch.randn(length, 16, generator=generator) for length in LENGTHS]
    timestep = torch.tensor([0.2, 0.7, 1.0])
    grids = [{"rows": height // 2, "columns": width // 2} for height, width in SIZES]
    inputs = {
        "hidden_states": [pack_cells(one[None])[0].T for one in latents],
        "encoder_hidden_states": torch.nn.utils.rnn.pad_sequence([*texts, torch.zeros(48, 16)], True)[:3],
        "timestep": timestep,
        "img_ids": [position_ids(**grid) for grid in grids],
    }
    if depth:
        inputs["depth_hidden_states"] = [
            torch.randn(grid["rows"] * grid["columns"], 16, generator=generator) for grid in grids
        ]
        inputs["depth_timestep"] = torch.tensor([1.0, 0.4, 0.0])
        inputs["depth_ids"] = [position_ids(time=1, **grid) for grid in grids]
    return inputs, ([one[:, None] for one in latents], 1 - timestep, texts)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return randomize(ZImageTransformer2DModel(**TINY_Z_IMAGE)).eval()


@pytest.fixture(params=[False, True], ids=["shared", "own"])
def model(request):
    torch.manual_seed(0)
    model = ModalityForcingZImageTransformer2DModel(**TINY_Z_IMAGE, **TINY_DEPTH, own_depth_modulation=request.param)
    return randomize(model).eval()


# The graft


def test_without_depth_it_is_z_image(base):
    """Sizes and texts differ in the batch, and no sequence is a multiple of 32 long, but for one text."""
    model = ModalityForcingZImageTransformer2DModel.from_base(base, depth_channels=16).eval()
    inputs, arguments = make_mixed_inputs(depth=False)
    with torch.no_grad():
        reference = base(*arguments).sample
    samples, depth_samples = predict(model, inputs)
    assert depth_samples is None
    for sample, expected in zip(samples, reference, strict=True):
        assert (sample + pack_cells(expected[:, 0][None])[0].T).abs().max() <= 1e-5


def test_a_batch_of_one_size_is_z_image_too(base):
    model = ModalityForcingZImageTransformer2DModel.from_base(base, depth_channels=16).eval()
    latents, text = torch.randn(2, 4, 8, 16), torch.randn(2, 32, 16)
    inputs = {
        "hidden_states": pack_cells(latents).transpose(1, 2),
        "encoder_hidden_states": text,
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": position_ids(rows=4, columns=8),
    }
    with torch.no_grad():
        reference = base(list(latents[:, :, None]), 1 - inputs["timestep"], list(text)).sample
    expected = pack_cells(torch.stack(reference)[:, :, 0]).transpose(1, 2)
    assert (predict(model, inputs)[0] + expected).abs().max() <= 1e-5


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graft_keeps_the_base(base, own, dtype):
    base = base.to(dtype)
    before = copy.deepcopy(base.state_dict())
    model = ModalityForcingZImageTransformer2DModel.from_base(
        base, depth_channels=16, num_depth_decoder_layers=2, own_depth_modulation=own
    )
    grafted = model.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(grafted[name], tensor) and grafted[name].data_ptr() != tensor.data_ptr()
    clones = depth_clones(grafted)
    assert all(torch.equal(grafted[depth], before[image]) for depth, image in clones.items())
    assert any("adaLN_modulation_depth" in name for name in clones) == own
    added = set(grafted) - set(before)
    assert all("depth" in name for name in added) and set(clones) < added
    assert {name for name in added if grafted[name].dtype != dtype} <= {
        "depth_head.proj_out.weight",
        "depth_head.norm_out.linear.weight",
    }
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    norms = [name for name in added if name.startswith("depth_decoder_blocks.") and "norm" in name]
    assert norms and all((grafted[name] == 1).all() for name in norms)


@pytest.mark.parametrize("own", [False, True])
def test_graft_starts_at_zero_depth_and_undisturbed_mixing(base, own):
    model = ModalityForcingZImageTransformer2DModel.from_base(base, depth_channels=16, own_depth_modulation=own).eval()
    inputs = make_inputs()
    sample, depth_sample = predict(model, inputs)
    assert not depth_sample.any()
    other, _ = predict(model, inputs | {"depth_timestep": torch.zeros(2)})
    # The level of the depth stream reaches RGB through the depth tokens alone, not through the mixers.
    assert not torch.equal(sample, other)
    temb = torch.randn(2, 48)
    mixed, depth_temb = model.depth_time_embed(temb, inputs["timestep"], inputs["timestep"])
    assert torch.equal(mixed, temb)
    assert torch.allclose(depth_temb, model.t_embedder(inputs["timestep"]), atol=1e-5)  # a copy of the image's


def test_own_modulation_starts_as_the_shared_one(base):
    samples = []
    for own in (False, True):
        torch.manual_seed(1)  # of the depth embedder, which starts fresh
        model = ModalityForcingZImageTransformer2DModel.from_base(base, depth_channels=16, own_depth_modulation=own)
        samples.append(predict(model.eval(), make_inputs())[0])
    assert torch.allclose(*samples, atol=1e-5)


def test_gradients_reach_every_weight(base, model):
    for one in (randomize(ModalityForcingZImageTransformer2DModel.from_base(base, depth_channels=16)), model):
        output = one(**make_inputs())
        (output.sample.square().mean() + output.depth_sample.square().mean()).backward()
        assert [name for name, parameter in one.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"siglip_feat_dim": 8}, "no SigLIP features"),
        ({"all_patch_size": [1, 2], "all_f_patch_size": [1, 1]}, "all_patch_size"),
        ({"axes_dims": [8, 8, 4]}, "must add up"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        ModalityForcingZImageTransformer2DModel(**TINY_Z_IMAGE | config)


# Streams


def test_modalities_hear_each_other_and_their_levels(model):
    inputs = make_inputs()
    sample, depth_sample = predict(model, inputs)
    for name in ("hidden_states", "timestep", "depth_hidden_states", "depth_timestep", "encoder_hidden_states"):
        other_sample, other_depth = predict(model, inputs | {name: inputs[name] * 0.5})
        assert not torch.allclose(other_sample, sample) and not torch.allclose(other_depth, depth_sample), name


def test_samples_of_a_batch_do_not_mix(model):
    """Each sample of a batch of several sizes and texts is what it is alone."""
    inputs, _ = make_mixed_inputs()
    samples, depth_samples = predict(model, inputs)
    for i, length in enumerate(LENGTHS):
        one = {name: values[i : i + 1] for name, values in inputs.items()}
        one["encoder_hidden_states"] = one["encoder_hidden_states"][:, :length]
        sample, depth_sample = predict(model, one)
        assert samples[i].shape == sample[0].shape == depth_samples[i].shape
        assert torch.allclose(sample[0], samples[i], atol=1e-5)
        assert torch.allclose(depth_sample[0], depth_samples[i], atol=1e-5)


def test_padding_of_the_prompt_changes_nothing(model):
    inputs = make_inputs()
    padded = torch.nn.functional.pad(inputs["encoder_hidden_states"], (0, 0, 0, 59))
    assert close(predict(model, inputs), predict(model, inputs | {"encoder_hidden_states": padded}), atol=1e-5)


def test_a_prompt_without_features(model):
    inputs = make_inputs()
    outputs = predict(model, inputs | {"encoder_hidden_states": torch.zeros(2, 5, 16)})
    assert all(torch.isfinite(output).all() for output in outputs)
