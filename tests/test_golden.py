"""Parity with tensors made by the published implementation; those of its autoencoder are not part of the project."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tiny import make_tokenizer, max_error
from transformers import Qwen3Config, Qwen3ForCausalLM

from mf_diffusers import DepthProcessor, ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.conversion import convert_published_autoencoder
from mf_diffusers.modality_forcing.latent_tokens import image_to_tokens, position_ids, tokens_to_latents
from mf_diffusers.modality_forcing.noise import shift_timestep
from mf_diffusers.modality_forcing.pipeline import token_positions
from mf_diffusers.modality_forcing.stream import Stream


@pytest.fixture(scope="module")
def transformer(golden_a):
    return ModalityForcingFlux2Transformer2DModel.from_published(golden_a)


@pytest.fixture(scope="module")
def vae(golden_autoencoder):
    config, weights = convert_published_autoencoder(
        load_file(golden_autoencoder / "ae_encoder.safetensors"),
        load_file(golden_autoencoder / "ae_decoder.safetensors"),
    )
    vae = AutoencoderKLFlux2(**config)
    vae.load_state_dict(weights)
    return vae.eval()


@pytest.fixture(scope="module")
def pipe(transformer):
    return ModalityForcingPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)),
        depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        depth_processor=DepthProcessor(),
    )


def max_relative_error(ours, reference):
    return max_error(ours / reference, torch.ones(()))


@pytest.mark.parametrize("prefix", ["", "small."])
@torch.no_grad()
def test_forward(golden_a, transformer, prefix):
    golden = load_file(golden_a / "forward.safetensors")
    output = transformer(
        hidden_states=golden[prefix + "img"],
        encoder_hidden_states=golden[prefix + "ctx"],
        timestep=golden[prefix + "timesteps"],
        img_ids=golden["img_ids"],
        txt_ids=golden["ctx_ids"],
        depth_hidden_states=golden[prefix + "depth"],
        depth_timestep=golden[prefix + "depth_timesteps"],
        depth_ids=golden["depth_ids"],
    )
    assert max_error(output.sample, golden[prefix + "rgb_out"]) <= 1e-4
    assert max_error(output.depth_sample, golden[prefix + "depth_out"]) <= 1e-4


def test_position_ids(golden_a):
    golden = load_file(golden_a / "forward.safetensors")
    assert torch.equal(position_ids(rows=4, columns=4).float()[0], golden["img_ids"][0])
    assert torch.equal(position_ids(time=1, rows=4, columns=4).float()[0], golden["depth_ids"][0])
    assert torch.equal(position_ids(length=7).float()[0], golden["ctx_ids"][0])


@pytest.mark.parametrize("case", ["joint_cfg", "joint_plain", "i2d", "d2i", "joint_clamp"])
@torch.no_grad()
def test_rollout(golden_a, pipe, case):
    """The pipeline's own sampling loop, fed the stored noise and time grids."""
    settings = json.loads((golden_a / "sample.json").read_text())[case]
    golden = {
        key.removeprefix(case + "."): tensor
        for key, tensor in load_file(golden_a / "sample.safetensors").items()
        if key.startswith(case + ".")
    }

    def walk(times):
        return pipe.prepare_scheduler(FlowMatchEulerDiscreteScheduler(shift=1.0), times[:-1], "cpu")

    def stream(name, is_given, **options):
        if is_given:
            return Stream.given(golden[f"clean_{name}"], golden[f"t_{name}"])
        scheduler = walk(golden[f"t_{name}"])
        return Stream(golden[f"noise_{name}"], scheduler.sigmas, scheduler=scheduler, **options)

    streams = {
        "image": stream("rgb", is_given=case == "i2d"),
        "depth": stream("depth", is_given=case == "d2i", predicts_clean=True),
    }
    pipe._guidance_scale = settings["cfg_scale"]
    uncond = golden.get("null_text_embed")
    negative = None if uncond is None else uncond.expand(2, -1, -1)
    pipe.denoise(streams, token_positions(4, 4, "cpu"), golden["ctx"], negative)
    latents, depth_latents = streams["image"].tokens, streams["depth"].tokens
    assert max_error(latents, golden["out_rgb"]) <= 1e-3
    assert max_error(depth_latents, golden["out_depth"]) <= 1e-3
    if case == "i2d":
        assert torch.equal(latents, golden["clean_rgb"])
    if case == "d2i":
        assert torch.equal(depth_latents, golden["clean_depth"])


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_schedules(golden_a, pipe, steps):
    """The two schedules and the trajectory are the published time grids."""
    golden = load_file(golden_a / "schedule.safetensors")
    even = torch.linspace(1, 1 / steps, steps)
    rgb = pipe.prepare_scheduler(pipe.scheduler, even, "cpu")
    for log2_alpha, name in ((-5, "m5"), (0, "0"), (5, "p5")):
        assert max_error(rgb.sigmas, golden[f"joint.n{steps}.alpha_{name}.t_rgb"]) <= 2e-6
        warped = shift_timestep(rgb.sigmas.double(), 2.0**log2_alpha)
        assert max_error(warped, golden[f"joint.n{steps}.alpha_{name}.t_depth"]) <= 2e-6
    depth = pipe.prepare_scheduler(pipe.depth_scheduler, even, "cpu")
    assert max_error(depth.sigmas, golden[f"i2d.n{steps}.alpha_none.t_depth"]) <= 2e-6


def test_depth_codec(golden_a):
    golden = load_file(golden_a / "depth_codec.safetensors")
    processor = DepthProcessor()
    tokens, valid, scale = processor.preprocess(golden["depth_map"].permute(0, 3, 1, 2))
    reference = golden["tokens"].flatten(1, 2)
    assert valid.all() and torch.isclose(scale, golden["depth_map"].mean()).all()
    assert max_relative_error(tokens, reference) <= 1e-5
    for tokens, decoded in (("tokens", "decoded"), ("random_tokens", "random_decoded")):
        depth, valid = processor.postprocess(golden[tokens].flatten(1, 2), 64, 80)
        reference = golden[decoded].permute(0, 3, 1, 2)
        assert max_relative_error(depth[valid], reference[valid]) <= 1e-5
        assert torch.equal(valid, (reference >= 1e-3) & (reference <= 1000))


def test_depth_codec_beyond_infinity(golden_a):
    """Where the published decoder returns negative or infinite depth, ours is finite, positive and not valid."""
    golden = load_file(golden_a / "depth_codec.safetensors")
    depth, valid = DepthProcessor().postprocess(golden["edge.tokens"].flatten(1, 2), 16, 16)
    reference = golden["edge.decoded"].permute(0, 3, 1, 2)
    assert torch.isfinite(depth).all() and (depth > 0).all()
    assert torch.equal(valid, (reference >= 1e-3) & (reference <= 1000))
    assert max_relative_error(depth[valid], reference[valid]) <= 1e-5


@torch.no_grad()
def test_autoencoder(golden_autoencoder, vae):
    golden = load_file(golden_autoencoder / "autoencoder.safetensors")
    image = (golden["image"].permute(0, 3, 1, 2) + 1) / 2
    assert max_error(image_to_tokens(vae, image), golden["latent"].flatten(1, 2)) <= 1e-4
    latents = tokens_to_latents(vae, golden["random_latent"].flatten(1, 2), 16, 12)
    assert max_error(vae.decode(latents).sample.permute(0, 2, 3, 1), golden["decoded"]) <= 1e-4


@pytest.mark.parametrize("prefix", ["dit.", ""])
def test_export_round_trip(golden_a, transformer, tmp_path, prefix):
    transformer.save_published(tmp_path / "model.safetensors", prefix=prefix)
    exported = load_file(tmp_path / "model.safetensors")
    published = load_file(golden_a / "model.safetensors")
    assert set(exported) == {prefix + key.removeprefix("dit.") for key in published}
    assert all(torch.equal(exported[prefix + key.removeprefix("dit.")], tensor) for key, tensor in published.items())
    again = ModalityForcingFlux2Transformer2DModel.from_published(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), transformer.state_dict().values()))


def test_published_pipeline(golden_autoencoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = make_tokenizer()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    given = ModalityForcingPipeline.from_published(golden_autoencoder, text_encoder, tokenizer, dtype=torch.float32)
    assert given.scheduler.config.shift == given.depth_scheduler.config.shift == math.exp(1.1)
    assert given.encode_prompt("a cat")[0].shape == (1, 512, 96)
    text_encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from_folder = ModalityForcingPipeline.from_published(golden_autoencoder, tmp_path)
    assert from_folder.transformer.dtype == from_folder.text_encoder.dtype == torch.bfloat16
    assert from_folder.vae.dtype == torch.float32
    assert from_folder.config.default_size_rule == "long_side" and from_folder.config.default_sample_size == 512
    assert from_folder.transformer.depth_head.proj_out.weight.dtype == torch.float32
    without = ModalityForcingPipeline.from_published(golden_autoencoder, text_encoder=None)
    assert without.text_encoder is None and without.vae.bn.running_mean.dtype == torch.float32
    with pytest.raises(TypeError, match="torch_dtype"):
        ModalityForcingPipeline.from_published(golden_autoencoder, torch_dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ModalityForcingPipeline.from_published(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="No known text encoder makes features of width 96"):
        ModalityForcingPipeline.from_published(golden_autoencoder)
