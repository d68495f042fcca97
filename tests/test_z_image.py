"""Z-Image with depth: pipeline, text, latents, LoRAs and adapters."""

import copy
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import make_pipeline, predict
from tiny_z_image import graft, make_z_image, make_z_image_pipeline
from transformers import Qwen3ForCausalLM

from mf_diffusers import ModalityForcingPipeline, ModalityForcingZImageTransformer2DModel
from mf_diffusers.checkpoints import convert_checkpoint, load_pipeline, read_checkpoint
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.latent_tokens import image_to_tokens, pack_cells, tokens_to_latents
from mf_diffusers.modality_forcing.pipeline import token_positions
from mf_diffusers.modality_forcing.task import even_levels


PROMPTS = ["a cat", "a large red ball on the green table"]
IMAGE = np.random.default_rng(0).random((40, 72, 3), dtype=np.float32)
DEPTH = 1 + np.random.default_rng(1).random((40, 72), dtype=np.float32)


@pytest.fixture
def base():
    return make_z_image()


@pytest.fixture
def pipe():
    return make_z_image_pipeline()


def call(pipe, *args, seed=0, num_inference_steps=2, output_type="np", **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipe(*args, generator=generator, num_inference_steps=num_inference_steps, output_type=output_type, **kwargs)


def same(a, b) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.depth, b.depth)


# What the base means by text, latents, time and sign


def test_text_features_are_z_images(base, pipe):
    """Those of the prompt's own tokens, and 0 where it is padded."""
    prompt_embeds, _ = pipe.encode_prompt(PROMPTS)
    assert prompt_embeds.shape == (2, 64, 16)
    expected = base._encode_prompt(list(PROMPTS), torch.device("cpu"), max_sequence_length=64)
    for features, ours in zip(expected, prompt_embeds):
        assert torch.allclose(ours[: len(features)], features, atol=1e-5) and not ours[len(features) :].any()


def test_latents_are_z_images(base):
    image = torch.rand(2, 3, 16, 24)
    tokens = image_to_tokens(base.vae, image)
    latents = base.vae.encode(2 * image - 1).latent_dist.mode()
    expected = (latents - base.vae.config.shift_factor) * base.vae.config.scaling_factor
    assert torch.allclose(tokens, pack_cells(expected).transpose(1, 2), atol=1e-5)
    assert torch.allclose(tokens_to_latents(base.vae, tokens, 4, 6), latents, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_sampling_without_depth_is_z_images(base, guidance_scale):
    """Step by step: time, sign, schedule, guidance, decoder. Z-Image's guidance of 4 is 5 here."""
    pipe = graft(base)
    latents = torch.randn(2, 4, 16, 24)
    expected = base(
        list(PROMPTS),
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        latents=latents,
        output_type="np",
        max_sequence_length=64,
    ).images
    with torch.no_grad():
        noise = pack_cells(latents).transpose(1, 2)
        streams = {"image": pipe.prepare_image_stream(None, noise, 32, 48, even_levels(4), "cpu")}
        embeds, negative = pipe.encode_prompt(PROMPTS)[0], pipe.encode_prompt(["", ""])[0]
        pipe._guidance_scale = guidance_scale + 1
        pipe.denoise(streams, token_positions(8, 12, "cpu"), embeds, negative)
        images = pipe.postprocess_image(streams["image"].tokens, 8, 12, None, (32, 48), "np")
    assert np.abs(images - expected).max() <= 1e-4


# The graft


def test_graft(base):
    before = copy.deepcopy(base.transformer.state_dict())
    pipe = ModalityForcingPipeline.from_base(base, text_encoder_out_layers=[3], max_sequence_length=64)
    grafted = pipe.transformer.state_dict()
    assert all(torch.equal(grafted[name], tensor) for name, tensor in before.items())
    assert pipe.depth_processor.config.patch_size == 4 and pipe.transformer.config.depth_channels == 16
    assert pipe.scheduler.config.shift == 6.0 and pipe.depth_scheduler.config.shift == pytest.approx(math.exp(1.1))
    assert pipe.config.default_guidance_scale == 5.0
    assert ModalityForcingPipeline.from_base(base).config.text_encoder_out_layers == [35]  # Qwen3-4B's
    assert pipe.vae is base.vae and pipe.text_encoder is base.text_encoder
    own = ModalityForcingPipeline.from_base(base, graft_config={"own_depth_modulation": True})
    assert own.transformer.config.own_depth_modulation


def test_the_three_tasks(pipe):
    joint = call(pipe, "a cat", height=24, width=40)
    assert joint.images.shape == (1, 24, 40, 3) and joint.depth.shape == joint.depth_mask.shape == (1, 24, 40)
    assert np.isfinite(joint.depth).all() and (joint.depth > 0).all()
    estimated = call(pipe, image=np.stack([IMAGE, 1 - IMAGE]))
    assert estimated.images is None and estimated.depth.shape == (2, 40, 72)
    assert call(pipe, "a cat", depth=DEPTH).images.shape == (1, 40, 72, 3)


def test_prompt_embeds(pipe):
    expected = call(pipe, "a cat")
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a cat")[0], pipe.encode_prompt("")[0]
    pipe.text_encoder = pipe.tokenizer = None
    assert same(call(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative), expected)
    with pytest.raises(ValueError, match=r"shape \(B, L, 16\), got \(1, 8, 40\)"):
        call(pipe, prompt_embeds=torch.zeros(1, 8, 40))


def test_model_offload_and_half_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.transformer.depth_head.proj_out.weight.dtype == torch.float32
    output = call(half, "a cat")
    assert np.isfinite(output.images).all()
    assert len(np.unique(output.depth)) > 0.9 * output.depth.size * output.depth_mask.mean()


def test_group_offload(pipe):
    before = call(pipe, "a cat")
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert same(call(pipe, "a cat"), before)


def test_save_and_load_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    output = call(pipe, "a cat", output_type="latent")
    script = f"""
import pathlib, torch, mf_diffusers
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
folder = pathlib.Path({str(tmp_path)!r})
pipe = DiffusionPipeline.from_pretrained(folder / "model")
assert type(pipe) is mf_diffusers.ModalityForcingPipeline
output = pipe("a cat", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="latent")
save_file({{"images": output.images, "depth": output.depth}}, folder / "out.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"HF_HUB_OFFLINE": "1", "PATH": ""}, timeout=300)
    loaded = load_file(tmp_path / "out.safetensors")
    assert torch.allclose(loaded["images"], output.images, atol=1e-4)
    assert torch.allclose(loaded["depth"], output.depth, atol=1e-4)


def test_one_file_in_the_original_layout_and_back(pipe, tmp_path):
    """As ComfyUI's single files have it: queries, keys and values in one."""
    pipe.save_pretrained(tmp_path / "pipeline")
    what, parameters = convert_checkpoint(tmp_path / "pipeline", tmp_path / "model.safetensors")
    assert what == "transformer" and parameters == sum(p.numel() for p in pipe.transformer.parameters())
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["layers.0.attention.qkv.weight"].shape == (144, 48)
    assert {"x_embedder.weight", "final_layer.linear.weight", "depth_refiner.0.attention.out.weight"} <= weights.keys()
    assert sum(tensor.numel() for tensor in weights.values()) == parameters
    again = ModalityForcingZImageTransformer2DModel.from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "pipeline"), subfolder="transformer"
    )
    ours = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())


def test_checkpoint_facts(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path, offline=True)
    assert checkpoint.parts["transformer"].cls is ModalityForcingZImageTransformer2DModel
    assert checkpoint.facts["scheduler_shift"] == 6.0


def test_the_vae_of_another_family_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "z_image")
    make_pipeline().save_pretrained(tmp_path / "flux2")
    index = json.loads((tmp_path / "z_image" / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKLFlux2"]
    (tmp_path / "z_image" / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(tmp_path / "z_image" / "vae")
    (tmp_path / "flux2" / "vae").rename(tmp_path / "z_image" / "vae")
    with pytest.raises(ValueError, match=r"the vae is a AutoencoderKLFlux2, but a .* for a AutoencoderKL\."):
        ModalityForcingPipeline.from_pretrained(tmp_path / "z_image")


# LoRAs


@pytest.fixture
def lora(base):
    """A LoRA of Z-Image as diffusers trains it, and the velocity that Z-Image predicts with it."""
    torch.manual_seed(3)
    targets = BACKBONES["z_image"].lora_targets.replace("layers", "(layers|noise_refiner|context_refiner)")
    base.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return get_peft_model_state_dict(base.transformer)


def original_lora(lora) -> dict:
    """The same in Z-Image's own names: queries, keys and values fused, their factors side by side."""
    weights = {}
    for name, down in lora.items():
        if ".lora_A." not in name:
            continue
        up, layer = lora[name.replace("lora_A", "lora_B")], name.removesuffix(".lora_A.weight")
        if layer.endswith((".to_k", ".to_v")):
            continue
        if layer.endswith(".to_q"):
            layers = [f"{layer[:-1]}{part}" for part in "qkv"]
            down = torch.cat([lora[f"{one}.lora_A.weight"] for one in layers])
            up = torch.block_diag(*(lora[f"{one}.lora_B.weight"] for one in layers))
            layer = layer.replace("to_q", "qkv")
        layer = layer.replace("to_out.0", "out")
        weights |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return weights


SPELLINGS = {
    "diffusers": lambda lora: {f"transformer.{name}": tensor for name, tensor in lora.items()},
    "no prefix": dict,
    "ai-toolkit": lambda lora: {f"diffusion_model.{name}": tensor for name, tensor in lora.items()},
    "original": lambda lora: {f"diffusion_model.{name}": tensor for name, tensor in original_lora(lora).items()},
    "original without prefix": original_lora,
    "kohya": lambda lora: {
        "lora_unet_"
        + name.rsplit(".lora_", 1)[0].replace(".", "_")
        + (".lora_down.weight" if "lora_A" in name else ".lora_up.weight"): tensor
        for name, tensor in lora.items()
    },
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_a_lora_in_every_spelling_does_what_it_does_to_z_image(program, base, lora, pipe, tmp_path):
    before = call(pipe, "a cat")
    save_file({name: t.contiguous() for name, t in SPELLINGS[program](lora).items()}, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="style")
    latents, text = torch.randn(1, 4, 8, 12), torch.randn(1, 7, 16)
    with torch.no_grad():
        expected = base.transformer([latents[0][:, None]], torch.tensor([0.4]), [text[0]]).sample[0][:, 0]
    inputs = {
        "hidden_states": pack_cells(latents).transpose(1, 2),
        "encoder_hidden_states": text,
        "timestep": torch.tensor([0.6]),
        "img_ids": token_positions(4, 6, "cpu")["image"],
    }
    sample, _ = predict(pipe.transformer, inputs)
    assert torch.allclose(-sample, pack_cells(expected[None]).transpose(1, 2), atol=1e-4)
    changed = call(pipe, "a cat")
    assert not np.array_equal(changed.images, before.images) and not np.array_equal(changed.depth, before.depth)
    pipe.set_adapters("style", 0.5)
    assert not same(call(pipe, "a cat"), changed)
    pipe.unload_lora_weights()
    assert same(call(pipe, "a cat"), before)


def test_a_lora_of_another_model_is_refused(pipe):
    with pytest.raises(ValueError, match="no place in this transformer"):
        pipe.load_lora_weights({"transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight": torch.ones(1, 8)})


# Adapters


@pytest.fixture
def trained(base):
    """A graft as training in "lora" mode leaves it."""
    pipe = graft(base, default_depth_steps=3, default_num_inference_steps=7)
    torch.manual_seed(4)
    targets = BACKBONES["z_image"].lora_targets
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if pipe.transformer.is_depth_parameter(name):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return pipe


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_goes_back_onto_its_base(trained, base, merge, tmp_path):
    trained.save_adapter(tmp_path / "adapter.safetensors", "tiny")
    expected = call(trained, "a cat")
    pipe = graft(base)
    before = call(pipe, "a cat")
    pipe.load_adapter(tmp_path / "adapter.safetensors", merge=merge)
    assert pipe.config.default_depth_steps == 3 and pipe.config.default_num_inference_steps == 7
    output = call(pipe, "a cat")
    assert np.abs(output.images - expected.images).max() < 1e-3 and not same(output, before)
    if not merge:
        pipe.unload_adapter()
        assert same(call(pipe, "a cat"), before)


def test_an_adapter_goes_onto_the_distilled_twin_when_asked(trained, tmp_path):
    """The twin has the base's sizes and other weights, and keeps its steps and guidance."""
    trained.save_adapter(tmp_path / "adapter.safetensors", "Tongyi-MAI/Z-Image")
    turbo = make_z_image(seed=1)
    settings = {"default_num_inference_steps": 8, "default_guidance_scale": 1.0}
    pipe = graft(turbo, **settings)
    with pytest.raises(ValueError, match=r"trained on Tongyi-MAI/Z-Image, which is not the base .* any_base=True"):
        pipe.load_adapter(tmp_path / "adapter.safetensors")
    before = call(pipe, "a cat")
    pipe.load_adapter(tmp_path / "adapter.safetensors", any_base=True)
    assert not same(call(pipe, "a cat"), before)
    assert pipe.config.default_num_inference_steps == 8 and pipe.config.default_guidance_scale == 1.0
    assert pipe.config.default_depth_steps == 3
    merged = graft(turbo, adapter=tmp_path / "adapter.safetensors", any_base=True, **settings)
    assert np.abs(call(merged, "a cat").images - call(pipe, "a cat").images).max() < 1e-3
    assert merged.config.default_num_inference_steps == 8


def test_base_and_adapter_from_the_command_lines_loader(trained, base, tmp_path):
    """The text encoder of the base lies in the file of a language model, as Qwen3's does."""
    trained.save_adapter(tmp_path / "adapter.safetensors", "tiny")
    base.transformer = make_z_image().transformer
    head = Qwen3ForCausalLM(base.text_encoder.config)
    head.model.load_state_dict(base.text_encoder.state_dict())
    base.save_pretrained(tmp_path / "base")
    head.save_pretrained(tmp_path / "base" / "text_encoder")
    assert all(name.startswith("model.") for name in load_file(tmp_path / "base/text_encoder/model.safetensors"))
    pipe = load_pipeline(str(tmp_path / "base"), "cpu", torch.float32, adapter=tmp_path / "adapter.safetensors")
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(call(pipe, "a cat").images - call(trained, "a cat").images).max() < 1e-3
    base.transformer = make_z_image(seed=1).transformer
    base.transformer.save_pretrained(tmp_path / "base" / "transformer")
    load_pipeline(str(tmp_path / "base"), "cpu", torch.float32, adapter=tmp_path / "adapter.safetensors", any_base=True)
    with pytest.raises(ValueError, match="trained on tiny, which is not the base"):
        load_pipeline(str(tmp_path / "base"), "cpu", torch.float32, adapter=tmp_path / "adapter.safetensors")
    assert isinstance(ZImagePipeline.from_pretrained(tmp_path / "base").text_encoder, type(base.text_encoder))
