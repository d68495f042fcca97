"""Z-Image with depth: the transformer."""

import copy

import pytest
import torch
from diffusers import MagCacheConfig, TaylorSeerCacheConfig, ZImageTransformer2DModel
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny import randomize
from tiny_z_image import TINY_Z_IMAGE, make_inputs, run

from mf_diffusers import ModalityForcingZImageTransformer2DModel
from mf_diffusers.modality_forcing.latent_tokens import pack_cells, position_ids
from mf_diffusers.modality_forcing.transformer_z_image import depth_clones


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


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {name: x.to(dtype) if x.is_floating_point() and "timestep" not in name else x for name, x in inputs.items()}


def close(a, b, **tolerance) -> bool:
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(a, b, strict=True))


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
    samples, depth_samples = run(model, inputs)
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
    assert (run(model, inputs)[0] + expected).abs().max() <= 1e-5


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
    sample, depth_sample = run(model, inputs)
    assert not depth_sample.any()
    other, _ = run(model, inputs | {"depth_timestep": torch.zeros(2)})
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
        samples.append(run(model.eval(), make_inputs())[0])
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
    sample, depth_sample = run(model, inputs)
    for name in ("hidden_states", "timestep", "depth_hidden_states", "depth_timestep", "encoder_hidden_states"):
        other_sample, other_depth = run(model, inputs | {name: inputs[name] * 0.5})
        assert not torch.allclose(other_sample, sample) and not torch.allclose(other_depth, depth_sample), name


def test_samples_of_a_batch_do_not_mix(model):
    """Each sample of a batch of several sizes and texts is what it is alone."""
    inputs, _ = make_mixed_inputs()
    samples, depth_samples = run(model, inputs)
    for i, length in enumerate(LENGTHS):
        one = {name: values[i : i + 1] for name, values in inputs.items()}
        one["encoder_hidden_states"] = one["encoder_hidden_states"][:, :length]
        sample, depth_sample = run(model, one)
        assert samples[i].shape == sample[0].shape == depth_samples[i].shape
        assert torch.allclose(sample[0], samples[i], atol=1e-5)
        assert torch.allclose(depth_sample[0], depth_samples[i], atol=1e-5)


def test_padding_of_the_prompt_changes_nothing(model):
    inputs = make_inputs()
    padded = torch.nn.functional.pad(inputs["encoder_hidden_states"], (0, 0, 0, 59))
    assert close(run(model, inputs), run(model, inputs | {"encoder_hidden_states": padded}), atol=1e-5)


def test_a_prompt_without_features(model):
    inputs = make_inputs()
    outputs = run(model, inputs | {"encoder_hidden_states": torch.zeros(2, 5, 16)})
    assert all(torch.isfinite(output).all() for output in outputs)


def test_without_timestep_mixing():
    model = ModalityForcingZImageTransformer2DModel(**TINY_Z_IMAGE, **TINY_DEPTH, depth_timestep_mixing=False)
    assert not any("alpha" in name or "rgb_to_depth" in name for name, _ in model.named_parameters())
    assert run(randomize(model), make_inputs())[1].shape == (2, 6, 16)


def test_tuple_output(model):
    with torch.no_grad():
        sample, depth_sample = model(**make_inputs(), return_dict=False)
    assert sample.shape == (2, 6, 16) and depth_sample.dtype == torch.float32


# diffusers' features


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = ModalityForcingZImageTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(run(model, make_inputs()), run(again, make_inputs())))


def test_bfloat16_body_with_float32_head(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = ModalityForcingZImageTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.depth_head.parameters()} == {torch.float32}
    inputs = make_inputs()
    sample, depth_sample = run(half, cast(inputs, torch.bfloat16))
    assert sample.dtype == torch.bfloat16 and depth_sample.dtype == torch.float32
    assert not torch.equal(depth_sample, depth_sample.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(**inputs).depth_sample.dtype == torch.float32


def loss_and_gradients(model):
    model.zero_grad()
    output = model(**make_inputs())
    loss = output.sample.square().mean() + output.depth_sample.square().mean()
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def test_gradient_checkpointing(model):
    loss, gradients = loss_and_gradients(model)
    model.enable_gradient_checkpointing()
    again, again_gradients = loss_and_gradients(model)
    assert loss == again
    assert close(gradients, again_gradients, atol=1e-7)


def test_regional_compile(model):
    before = run(model, make_inputs())
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert close(before, run(model, make_inputs()), atol=1e-5)


def test_lora_adapter(model):
    before = run(model, make_inputs())
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "w2"], init_lora_weights=False))
    changed = run(model, make_inputs())
    assert not torch.allclose(before[0], changed[0]) and not torch.allclose(before[1], changed[1])
    off = model(**make_inputs(), joint_attention_kwargs={"scale": 0.0})
    assert torch.allclose(off.depth_sample, before[1], atol=1e-6)
    model.delete_adapters("default")
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, make_inputs())))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(model, backend):
    before = run(model, make_inputs())
    model.set_attention_backend(backend)
    assert close(before, run(model, make_inputs()), atol=1e-5)


def test_layerwise_casting(model):
    before = run(model, make_inputs())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.layers[0].attention.to_q.weight.dtype == torch.float8_e4m3fn
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


# Z-Image itself has no caches in diffusers 0.42. By its default names TaylorSeer finds nothing to cache here.
@pytest.mark.parametrize(
    "config",
    [
        TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=1,
            cache_identifiers=[r"layers\.\d+\.(attention|feed_forward)"],
        ),
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
