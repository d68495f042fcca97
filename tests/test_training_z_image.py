"""Z-Image in the training scripts, on tiny models and a few procedural scenes."""

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file
from tiny import make_pipeline, transformer_inputs
from tiny_z_image import TINY_Z_IMAGE, graft, make_z_image
from training_runs import SCENES, assert_it_learns, run, settings, weights

from finetune import post_train, pretrain
from finetune.data.cache import CacheConfig
from finetune.post_train import PostTrainConfig, make_teacher
from mf_diffusers import ModalityForcingPipeline, ModalityForcingZImageTransformer2DModel
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.latent_tokens import decode_latents, image_to_tokens, tokens_to_latents
from mf_diffusers.modality_forcing.objective import ObjectiveConfig


def z_image_settings(base, output, mode, *more, **trainer) -> list[str]:
    chosen = [a for a in settings(base, f"{output}-cache", output, **trainer) if "out_layers" not in a]
    return [*chosen, "architecture=z_image", f"mode={mode}", "lora_rank=2", "text_encoder_out_layers=[3]", *more]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_z_image().save_pretrained(folder)
    return folder


def test_the_base_itself_is_called_as_the_graft_is():
    """For a teacher, and where it is pre-trained: rows and columns, sign and time, prompts without their padding."""
    pipe = graft(make_z_image())
    base, inputs = make_z_image().transformer, transformer_inputs(16, depth=False)
    inputs["encoder_hidden_states"][0, 3:] = 0
    with torch.no_grad():
        (velocity,) = BACKBONES["z_image"].call_base(base, **inputs, return_dict=False)
        assert torch.allclose(velocity, pipe.transformer(**inputs).sample, atol=1e-5)
        config = PostTrainConfig(architecture="z_image", objective=ObjectiveConfig(distillation_high=1.0))
        teacher = make_teacher(config, pipe.transformer, base, torch.device("cpu"))
        assert torch.allclose(teacher(**inputs, return_dict=False)[0], velocity)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_it_learns(own):
    """A few steps on one batch bring both losses down, from an untrained base on."""
    torch.manual_seed(0)
    base = ZImageTransformer2DModel(**TINY_Z_IMAGE)
    model = ModalityForcingZImageTransformer2DModel.from_base(base, depth_channels=16, own_depth_modulation=own).train()
    assert_it_learns(model, text_channels=16, learning_rate=3e-3)


def test_mode_full_freezes_the_refiners_and_resumes(base, tmp_path, monkeypatch):
    distils = ["objective.distillation_high=1.0", "objective.distillation_low=0.2", "graft.own_depth_modulation=true"]
    for output, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run(post_train, z_image_settings(base, tmp_path / output, "full", *distils, steps=steps), tmp_path, monkeypatch)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert any("adaLN_modulation_depth" in name for name in whole)
    before = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in before.items():
        frozen = name.startswith(("noise_refiner.", "context_refiner."))
        assert torch.equal(whole[name], tensor) == frozen, name


def test_mode_lora_leaves_an_adapter_for_the_base(base, tmp_path, monkeypatch):
    more = ["trainer.gradient_checkpointing=true", "objective.distillation_high=1.0"]
    run(post_train, z_image_settings(base, tmp_path / "run", "lora", *more, steps=3), tmp_path, monkeypatch)
    trained = ModalityForcingPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    adapter = tmp_path / "run" / "pipeline.adapter.safetensors"
    pipe = ModalityForcingPipeline.from_base(ZImagePipeline.from_pretrained(base), adapter=adapter)
    assert pipe.config.text_encoder_out_layers == [3] and pipe.scheduler.config.shift == 6.0
    image = np.random.default_rng(0).random((32, 32, 3))
    depths = []
    for one in (trained, pipe):
        one.set_progress_bar_config(disable=True)
        depths.append(one(image=image, num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").depth)
    assert np.allclose(*depths, rtol=1e-3)


def test_a_plain_autoencoder_has_the_same_pictures():
    vae = make_pipeline().vae
    plain, image = pretrain.plain_autoencoder(vae).eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        latents = [tokens_to_latents(one, image_to_tokens(one, image), 8, 8) for one in (vae, plain)]
        assert torch.allclose(*latents, atol=1e-4)
        assert torch.allclose(*(decode_latents(one, latents[0]) for one in (vae, plain)), atol=1e-5)
        # Noise of the whitened latents' statistics has mean 0 and spread 1 by the plain ones, too.
        noise = tokens_to_latents(vae, torch.randn(64, 64, 16, generator=torch.Generator().manual_seed(0)), 8, 8)
        noise = (noise - plain.config.shift_factor) * plain.config.scaling_factor
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_a_base_is_pretrained_and_post_trained(tmp_path, monkeypatch):
    make_pipeline().vae.save_pretrained(tmp_path / "vae")  # FLUX.2's kind, of which one of Z-Image's is made
    arguments = [
        "architecture=z_image",
        f"vae={tmp_path / 'vae'}",
        *(f"transformer.{name}={value}" for name, value in TINY_Z_IMAGE.items()),
        "text_encoder={hidden_size: 16, intermediate_size: 32, num_hidden_layers: 3, num_attention_heads: 2, "
        "num_key_value_heads: 1, head_dim: 8}",
        "text_encoder_out_layers=[2]",
        "vocabulary_size=300",
        "max_sequence_length=40",
        f"data={SCENES}",
        "validation_samples=4",
        f"cache={{folder: {tmp_path / 'cache'}, samples: 8, pixels: 1024, text: false}}",
        *(a for a in settings("", "", tmp_path / "base", steps=3) if a.startswith("trainer.")),
    ]
    run(pretrain, arguments, tmp_path, monkeypatch)
    base = ZImagePipeline.from_pretrained(tmp_path / "base" / "pipeline")
    base.set_progress_bar_config(disable=True)
    config = pretrain.PretrainConfig(cache=CacheConfig(pixels=1024))
    assert pretrain.picture_grid(config, base, ["a red ball", "a blue box"], token_size=4).height > 2 * 96
    more = ["text_encoder_out_layers=[2]", "max_sequence_length=40"]
    run(
        post_train,
        z_image_settings(tmp_path / "base/pipeline", tmp_path / "run", "all", *more, steps=2),
        tmp_path,
        monkeypatch,
    )
    assert ModalityForcingPipeline.from_pretrained(tmp_path / "run" / "pipeline").has_depth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["graft.own_modulation=true"], "graft.own_modulation is no setting"),
        (["extra_depth_decoder_layers=1"], "takes no extra_depth_decoder_layers"),
    ],
)
def test_settings_that_do_not_go(base, tmp_path, monkeypatch, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(post_train, z_image_settings(base, tmp_path / "run", "full", *arguments), tmp_path, monkeypatch)
