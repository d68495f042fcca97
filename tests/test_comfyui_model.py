"""The native model inside ComfyUI, against the library: the same transformer, the same samples."""

import copy
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_models import (
    HEIGHT,
    TOKEN,
    WIDTH,
    Sampling,
    call_both,
    call_library,
    clean_from_velocity,
    inputs,
)
from diffusers import AutoencoderKLFlux2
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import TINY_TRANSFORMER, make_pipeline, max_error, randomize

from comfyui_nodes.streams import DEPTH_STRENGTHS, held_at
from mf_diffusers import DepthProcessor, ModalityForcingFlux2Transformer2DModel
from mf_diffusers.modality_forcing.conversion import export_published_transformer
from mf_diffusers.modality_forcing.latent_tokens import (
    decode_latents,
    image_to_tokens,
    tokens_to_latents,
)
from mf_diffusers.modality_forcing.noise import velocity_from_clean


COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("needs ComfyUI: set COMFYUI_PATH, and run in its Python environment", allow_module_level=True)
pytestmark = pytest.mark.comfyui
pytest_plugins = ["comfyui_models"]


@pytest.fixture(scope="module")
def file(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    pipeline.transformer.save_published(path, prefix="")
    return path


@pytest.fixture(scope="module")
def model(comfy, file):
    return comfy.sd.load_diffusion_model(str(file))


# The transformer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth_timestep_mixing": False, "num_depth_decoder_layers": 3},
        {"num_attention_heads": 3, "mlp_ratio": 2.5, "num_layers": 1, "num_single_layers": 3},
    ],
)
def test_transformer_parity(comfy, tmp_path, changes):
    torch.manual_seed(0)
    transformer = randomize(ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER | changes)).eval()
    transformer.save_published(tmp_path / "model.safetensors", prefix="")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
    assert model.model.get_dtype() == torch.float32
    for ours, reference in call_both(model, transformer):
        assert max_error(ours, reference) <= 1e-4


def test_bfloat16_body_and_float32_head(comfy, pipeline, tmp_path):
    transformer = ModalityForcingFlux2Transformer2DModel.from_config(pipeline.transformer.config)
    transformer.load_state_dict(pipeline.transformer.state_dict())
    transformer.to(torch.bfloat16).save_published(tmp_path / "model.safetensors", prefix="")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"), {"dtype": torch.bfloat16})
    head = model.model.diffusion_model.depth_final_layer
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert model.model.diffusion_model.depth_in.weight.dtype == torch.bfloat16
    (velocity, reference), (depth, depth_reference) = call_both(model, transformer, torch.bfloat16)
    assert depth.dtype == torch.float32 and velocity.dtype == torch.bfloat16
    # Roundings fall differently: as far from one another as from float32.
    assert max_error(velocity.float(), reference.float()) <= 0.05
    assert max_error(depth, depth_reference) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_storage(comfy, file, model, dtype):
    small = comfy.sd.load_diffusion_model(str(file), {"dtype": dtype})
    parameters = dict(small.model.diffusion_model.named_parameters())
    stays = {name for name, parameter in parameters.items() if parameter.dtype != dtype}
    assert stays and all(name.startswith(("depth_final_layer.", "cross_alpha_")) for name in stays)
    image, depth, levels, context = inputs()
    with torch.no_grad():
        velocity, clean = small.model.diffusion_model([image, depth], levels, context)
        reference, clean_reference = model.model.diffusion_model([image, depth], levels, context)
    clean, clean_reference = (clean_from_velocity(depth, x, levels[1]) for x in (clean, clean_reference))
    assert max_error(velocity, reference) <= 0.3 * reference.abs().max()
    assert max_error(clean, clean_reference) <= 0.3 * clean_reference.abs().max()


def test_partial_offload(comfy, file, pipeline):
    """Half of the weights stay behind and are brought over as they are used."""
    model = comfy.sd.load_diffusion_model(str(file))
    model.load(torch.device("cpu"), lowvram_model_memory=model.model_size() // 2)
    assert model.model.model_lowvram
    for ours, reference in call_both(model, pipeline.transformer):
        assert max_error(ours, reference) <= 1e-4


def test_golden_forward(comfy, golden_a, tmp_path):
    weights = {key.removeprefix("dit."): x for key, x in load_file(golden_a / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors")).model.diffusion_model
    golden = load_file(golden_a / "forward.safetensors")
    for prefix in ("", "small."):
        image = golden[prefix + "img"].transpose(1, 2).unflatten(2, (4, 4))
        depth = model.depth_processor.unpatchify(golden[prefix + "depth"], 64, 64)
        levels = golden[prefix + "timesteps"], golden[prefix + "depth_timesteps"]
        with torch.no_grad():
            velocity, clean = model([image, depth], levels, golden[prefix + "ctx"])
            clean = clean_from_velocity(depth, clean, levels[1])
        assert max_error(velocity.flatten(2).transpose(1, 2), golden[prefix + "rgb_out"]) <= 1e-4
        assert max_error(model.depth_processor.patchify(clean), golden[prefix + "depth_out"]) <= 1e-4


def test_klein_lora(comfy, file, pipeline):
    """A LoRA in diffusers' names changes the patched model as it changes the library's."""
    generator = torch.Generator().manual_seed(2)
    weights = dict(pipeline.transformer.named_parameters())
    lora, merged = {}, {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    for name in (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_v",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.0.ff.linear_in",
        "transformer_blocks.1.ff_context.linear_out",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.1.attn.to_out",
    ):
        rows, columns = weights[f"{name}.weight"].shape
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        lora |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        merged[f"{name}.weight"] += 0.1 * up @ down
    model = comfy.sd.load_diffusion_model(str(file))
    before = call_both(model, pipeline.transformer)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.1, 0.0)
    assert len(patched.patches) == 8
    patched.patch_model()
    transformer = ModalityForcingFlux2Transformer2DModel.from_config(pipeline.transformer.config).eval()
    transformer.load_state_dict(merged)
    for (ours, reference), (unpatched, _) in zip(call_both(patched, transformer), before):
        assert max_error(ours, reference) <= 1e-4
        assert max_error(ours, unpatched) > 1e-2
    patched.unpatch_model()


@torch.no_grad()
def test_an_adapter_on_its_base(comfy, pipeline, tmp_path):
    """Depth modules, LoRA and settings of one file, onto a FLUX.2 without depth, as the library has them."""
    from comfyui_nodes.loader import load_adapter

    trained = make_pipeline()
    base = {
        key: tensor
        for key, tensor in export_published_transformer(trained.transformer.state_dict(), prefix="").items()
        if "depth" not in key and "cross_alpha" not in key
    }
    save_file(base, tmp_path / "base.safetensors")
    targets = r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_qkv_mlp_proj)"
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    trained.transformer.add_adapter(lora)
    trained.register_to_config(default_sample_size=48, default_log2_alpha=-2.0)
    trained.save_adapter(tmp_path / "pipeline.adapter.safetensors", base="a base")

    files = tmp_path / "base.safetensors", tmp_path / "pipeline.adapter.safetensors"
    model = load_adapter(*files)
    assert (model.model.sample_size, model.model.log2_alpha) == (48, -2.0)
    assert sum(map(len, model.patches.values())) == 6  # queries and keys of two blocks, and the fused layers of two
    model.patch_model()
    for ours, reference in call_both(model, trained.transformer):
        assert max_error(ours, reference) <= 1e-4
    model.unpatch_model()
    assert max_error(*call_both(load_adapter(*files, strength=0.0), trained.transformer)[0]) > 1e-2
    base["double_blocks.0.img_attn.qkv.weight"] *= 2
    save_file(base, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was trained on a base, which is not the base"):
        load_adapter(tmp_path / "other.safetensors", tmp_path / "pipeline.adapter.safetensors")
    with pytest.raises(ValueError, match="is no adapter"):
        load_adapter(tmp_path / "base.safetensors", tmp_path / "base.safetensors")


def test_the_published_size(comfy):
    """Every key of the 9B model has its place, without a weight in memory."""
    with torch.device("meta"):
        transformer = ModalityForcingFlux2Transformer2DModel()
    weights = export_published_transformer(transformer.state_dict(), prefix="")
    config = comfy.model_detection.model_config_from_unet(weights, "")
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(weights, device=torch.device("meta"))
    expected = {key.replace("_norm.scale", "_norm.weight"): x.shape for key, x in weights.items()}
    assert {key: x.shape for key, x in model.diffusion_model.state_dict().items()} == expected
    assert model.latent_format.latent_channels == 128 and model.latent_format.spacial_downscale_ratio == 16
    # An image and its depth are twice the tokens of FLUX.2, so twice the memory.
    flux2 = comfy.supported_models.Flux2({"hidden_size": 4096}).memory_usage_factor
    assert model.memory_usage_factor * (128 + 256) == pytest.approx(2 * flux2)


def test_what_comfyui_saved(comfy, model, pipeline, tmp_path):
    """ComfyUI's own save node has another prefix and other names for norms."""
    weights = model.model.state_dict_for_saving(model.model.diffusion_model.state_dict())
    config = comfy.model_detection.model_config_from_unet(weights, "model.diffusion_model.")
    assert type(config).__name__ == "ModalityForcingConfig"  # of a whole checkpoint, too
    save_file({key: x.contiguous() for key, x in weights.items()}, tmp_path / "saved.safetensors")
    saved = comfy.sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    for ours, reference in call_both(saved, pipeline.transformer):
        assert max_error(ours, reference) <= 1e-4


def test_flux2_autoencoder_is_comfyuis_own(comfy, tmp_path):
    """Of FLUX.2's geometry, the VAE is ComfyUI's class; of any other, diffusers'."""
    from comfyui_nodes.loader import DiffusersAutoencoder, load_vae

    torch.manual_seed(0)
    autoencoder = AutoencoderKLFlux2().eval()
    autoencoder.bn.running_mean.normal_()
    autoencoder.save_pretrained(tmp_path)
    vae = load_vae(tmp_path)
    assert not isinstance(vae.first_stage_model, DiffusersAutoencoder) and vae.latent_channels == 128
    image = torch.rand(1, 32, 48, 3)
    with torch.no_grad():
        latents, reference = vae.encode(image), image_to_tokens(autoencoder, image.movedim(-1, 1))
        assert max_error(latents.flatten(2).transpose(1, 2), reference) <= 1e-4
        pixels = decode_latents(autoencoder, tokens_to_latents(autoencoder, reference, 2, 3)) / 2 + 0.5
        assert max_error(vae.decode(latents), pixels.movedim(1, -1)) <= 1e-4


def test_weights_that_are_not_whole(comfy, file):
    weights = load_file(file)
    del weights["depth_final_layer.linear.weight"]
    with pytest.raises(ValueError, match=r"Missing keys: depth_final_layer.linear.weight"):
        comfy.sd.load_diffusion_model_state_dict(weights)
    weights = load_file(file)
    for part in ("in_layer", "out_layer"):
        weights[f"guidance_in.{part}.weight"] = weights[f"time_in.{part}.weight"].clone()
    with pytest.raises(ValueError, match="guidance-distilled"):
        comfy.sd.load_diffusion_model_state_dict(weights)


# The nodes


def test_a_pipelines_settings_are_the_models(comfy, pipeline, tmp_path):
    from comfyui_nodes.loader import load_pipeline

    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"default_sample_size": 48, "default_size_rule": "long_side", "default_log2_alpha": -2.0}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    settings = {"near": 0.01, "far": 30.0, "infinite_depth": True}
    DepthProcessor(patch_size=TOKEN, **settings).save_pretrained(tmp_path / "depth_processor")
    model = load_pipeline(tmp_path)[0].model
    assert (model.sample_size, model.size_rule, model.log2_alpha) == (48, "long_side", -2.0)
    assert settings.items() <= dict(model.depth_processor.config).items()
    assert model.depth_processor.config.patch_size == TOKEN
    (tmp_path / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_pipeline(tmp_path)


def test_size_is_read_by_the_models_rule(model, monkeypatch):
    from comfyui_nodes.latent_nodes import Encode

    def encoded():
        latent = Encode.execute(model, "depth", "rigid", False, 32, depth=torch.ones(1, 38, 50, 3)).result[0]
        return tuple(latent["samples"].unbind()[1].shape[-2:])

    assert encoded() == (24, 32)
    monkeypatch.setattr(model.model, "size_rule", "area")
    assert encoded() == (28, 36)


# Sampling


@pytest.fixture(scope="module")
def sampling(comfy, model, pipeline):
    return Sampling(comfy, model, pipeline)


@pytest.mark.parametrize("log2_alpha", [None, -5.0, 0.0, 8.0])
def test_joint(sampling, log2_alpha):
    noise = {"latents": sampling.image_noise, "depth_latents": sampling.depth_noise}
    sampling.check(sampling.ours(log2_alpha=log2_alpha), sampling.library(log2_alpha=log2_alpha, **noise))


def test_the_same_seed_is_the_same_noise(sampling, comfy):
    """ComfyUI draws image and depth noise as the library does."""
    empty = [torch.zeros_like(sampling.image_noise), torch.zeros_like(sampling.depth_noise)]
    noise = comfy.sample.prepare_noise(comfy.nested_tensor.NestedTensor(empty), 7).unbind()
    sampling.check(sampling.ours(noise=noise), sampling.library(generator=torch.Generator().manual_seed(7)))


def test_scheduler_simple_has_the_librarys_levels(sampling, comfy):
    levels = comfy.samplers.calculate_sigmas(sampling.model.get_model_object("model_sampling"), "simple", 50)
    assert max_error(levels, sampling.sigmas(50)) <= 1e-5


def test_image_to_depth(sampling):
    tokens = image_to_tokens(sampling.pipeline.vae, sampling.image).detach()
    given = tokens.transpose(1, 2).unflatten(2, sampling.image_noise.shape[-2:])
    depth = torch.zeros_like(sampling.depth_noise)
    for log2_alpha in (None, -5.0):  # which has no say here
        ours = sampling.ours(
            [given, depth], [torch.zeros_like(given), torch.ones_like(depth)], cfg=1.0, log2_alpha=log2_alpha
        )
        assert torch.equal(ours[0], given)
        sampling.check(ours, sampling.library(image=sampling.image, depth_latents=sampling.depth_noise))


def test_depth_to_image(sampling):
    depth = sampling.depth.clone()
    depth[:, :, :9, :13], depth[:, :, 17, 3:6] = 0, torch.nan
    given, valid, _ = sampling.pipeline.depth_processor.normalize(depth)
    latent = [torch.zeros_like(sampling.image_noise), given]
    for strength, log2_alpha in DEPTH_STRENGTHS.items():
        mask = [torch.ones_like(sampling.image_noise), torch.where(valid, held_at(strength), 1.0)]
        noise = {"latents": sampling.image_noise, "depth_latents": sampling.depth_noise}
        if log2_alpha is None:  # holes are filled from the generator, after the image's noise
            noise = {"generator": torch.Generator().manual_seed(5)}
            generator = torch.Generator().manual_seed(5)
            drawn = [torch.randn(x.shape, generator=generator) for x in latent]
        else:
            drawn = [sampling.image_noise, sampling.depth_noise]
        ours = sampling.ours(latent, mask, drawn)
        assert torch.equal(ours[1], given)
        sampling.check(ours, (sampling.library(depth=depth, log2_alpha=log2_alpha, **noise)[0], None))


@pytest.mark.parametrize("case", ["joint_cfg", "joint_plain", "i2d", "d2i", "joint_clamp"])
@torch.no_grad()
def test_golden_rollout(comfy, golden_a, tmp_path, case):
    """The stored noise and time grids through ComfyUI's Euler sampler."""
    weights = {key.removeprefix("dit."): x for key, x in load_file(golden_a / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
    settings = json.loads((golden_a / "sample.json").read_text())[case]
    golden = {
        key.removeprefix(case + "."): tensor
        for key, tensor in load_file(golden_a / "sample.safetensors").items()
        if key.startswith(case + ".")
    }
    processor = model.model.diffusion_model.depth_processor
    nested = comfy.nested_tensor.NestedTensor
    zeros = torch.zeros(2, 16, 128), torch.zeros(2, 16, 256)

    def streams(image, depth):
        return [image.transpose(1, 2).unflatten(2, (4, 4)), processor.unpatchify(depth, 64, 64)]

    # Where both are made, the plain case has both at one level.
    model.add_object_patch("log2_alpha", settings["log2_alpha"] or 0.0)
    uncond = golden.get("null_text_embed", golden["ctx"][:1]).expand(2, -1, -1)
    samples = comfy.sample.sample_custom(
        model,
        nested(streams(golden.get("noise_rgb", zeros[0]), golden.get("noise_depth", zeros[1]))),
        settings["cfg_scale"],
        comfy.samplers.sampler_object("euler"),
        golden["t_depth"] if case == "i2d" else golden["t_rgb"],
        [[golden["ctx"], {}]],
        [[uncond, {}]],
        nested(streams(golden.get("clean_rgb", zeros[0]), golden.get("clean_depth", zeros[1]))),
        noise_mask=nested(
            [torch.full((2, 1, 4, 4), float(case != "i2d")), torch.full((2, 1, 64, 64), float(case != "d2i"))]
        ),
        disable_pbar=True,
    )
    image, depth = samples.unbind()
    assert max_error(image.flatten(2).transpose(1, 2), golden["out_rgb"]) <= 1e-3
    assert max_error(processor.patchify(depth), golden["out_depth"]) <= 1e-3


def test_better_solvers_are_closer_to_the_limit(sampling):
    """The same equation for every sampler: one of higher order comes closer to many Euler steps than Euler does."""
    settings = {"cfg": 1.0, "log2_alpha": -5.0}
    limit = sampling.ours(**settings, sigmas=sampling.sigmas(300))
    euler = sampling.ours(**settings, sigmas=sampling.sigmas(40))
    for sampler in ("heun", "dpmpp_2m", "uni_pc"):
        better = sampling.ours(**settings, sigmas=sampling.sigmas(40), sampler=sampler)
        for x_limit, x_euler, x_better in zip(limit, euler, better):
            assert (x_better - x_limit).norm() < (x_euler - x_limit).norm() < 0.1 * x_limit.norm()


class Reference:
    """What a sampler's model is to return, by the method's equations and the library's transformer."""

    def __init__(self, sampling, log2_alpha, cfg, name):
        self.sampling, self.alpha, self.cfg, self.name = sampling, 2.0**log2_alpha, cfg, name
        self.levels = []
        self.prompts = [sampling.pipeline.encode_prompt(prompt)[0].detach() for prompt in ("a red ball", "")]
        # Samplers ask a model's wrapper for its noise levels.
        model = sampling.model
        self.inner_model = SimpleNamespace(model_patcher=model, inner_model=model.model)

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        self.levels.append(sigma)
        if self.name in NO_FLOW:
            total = signal_of(self.name, self.levels) + sigma
            x, sigma = x / total, sigma / total
        image, depth = x.split([self.sampling.image_noise.numel(), self.sampling.depth_noise.numel()], dim=-1)
        image = image.view(self.sampling.image_noise.shape)
        # What is carried is x_t (1 + (a - 1) sigma) / a, and depth's own level a sigma / (1 + (a - 1) sigma).
        share = self.alpha / (1 + (self.alpha - 1) * sigma)
        depth, level = depth.view(self.sampling.depth_noise.shape) * share, sigma * share
        estimates = []
        for prompt in self.prompts:
            velocity, clean = call_library(self.sampling.pipeline.transformer, image, depth, [sigma, level], prompt)
            clean = depth - level * velocity_from_clean(depth, clean, level)
            estimates.append(
                torch.cat([(image - sigma * velocity).flatten(), clean.flatten() / self.alpha]).view(x.shape)
            )
        cond, uncond = estimates
        denoised = uncond + self.cfg * (cond - uncond)
        for function in (model_options or {}).get("sampler_post_cfg_function", []):
            denoised = function({"denoised": denoised, "cond_denoised": cond, "uncond_denoised": uncond})
        return denoised


NO_FLOW = {"ddpm", "dpmpp_2s_ancestral_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp"}


def signal_of(name, levels):
    """The share of the signal in what a sampler hands over at the last of these levels, beside noise of it."""
    if name not in NO_FLOW:
        return 1 - levels[-1]
    # Every second question of this one is half way through a step.
    begin = levels[-2] if name == "dpmpp_2s_ancestral_cfg_pp" and len(levels) % 2 == 0 else levels[-1]
    return 1 - levels[-1] * begin


def test_samplers_without_a_form_for_flows(sampling, comfy):
    """Of a signal that is known, all but four hand the model ``1 - sigma``, beside noise of sigma."""

    class Known(Reference):
        def __init__(self):
            self.inner_model, self.seen = (
                SimpleNamespace(model_patcher=sampling.model, inner_model=sampling.model.model),
                [],
            )

        def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
            self.seen.append((float(sigma), float(x.mean()) / 10, float(x.std())))
            denoised = torch.full_like(x, 10.0)
            for function in (model_options or {}).get("sampler_post_cfg_function", []):
                function({"denoised": denoised, "uncond_denoised": denoised})
            return denoised

    noise = torch.randn(1, 1, 20000, generator=torch.Generator().manual_seed(0))
    for name in comfy.samplers.KSampler.SAMPLERS:
        model = Known()
        end = comfy.samplers.sampler_object(name).sampler_function(
            model, noise, sampling.sigmas(20).clone(), {"seed": 0}, callback=None, disable=True
        )
        sigma, signal, std = torch.tensor(model.seen).T
        expected = torch.stack([signal_of(name, sigma[: i + 1]) for i in range(len(sigma))])
        assert torch.allclose(signal, expected, atol=0.02), name
        assert torch.allclose(std, sigma, atol=0.02), name
        assert (float(end.std()) > 0.1) == (name in ("dpm_fast", "dpm_adaptive")), name


@pytest.mark.parametrize("log2_alpha", [-5.0, 0.0, 5.0])
@torch.no_grad()
def test_every_sampler_goes_by_the_methods_equations(sampling, comfy, log2_alpha):
    sigmas, cfg = sampling.sigmas(6), 1.5
    off = {}
    for name in comfy.samplers.KSampler.SAMPLERS:
        noise = torch.cat([sampling.image_noise.flatten(), sampling.depth_noise.flatten()])[None, None]
        levels = sigmas.clone()
        model = Reference(sampling, log2_alpha, cfg, name)
        reference = comfy.samplers.sampler_object(name).sampler_function(
            model, noise, levels, {"seed": 0}, callback=None, disable=True
        )
        reference = reference / (1 - levels[-1])  # uni_pc ends above 0, which it writes here
        if name in ("dpm_fast", "dpm_adaptive"):
            reference = model(reference, levels[-2:-1])
        reference = reference.split([sampling.image_noise.numel(), sampling.depth_noise.numel()], dim=-1)
        ours = sampling.ours(sampler=name, log2_alpha=log2_alpha, cfg=cfg, sigmas=sigmas.clone())
        for x, y, scale in zip(ours, reference, (1.0, 2.0**log2_alpha)):
            y = y.view(x.shape) * scale
            off[name] = max(off.get(name, 0.0), max_error(x, y) / float(y.abs().max()))
    assert len(off) >= 44 and max(off.values()) <= 1e-3, {name: x for name, x in off.items() if not x <= 1e-3}


def test_a_run_in_two_parts(sampling):
    """What a sampler leaves over, the next one takes up: the latent carries its trajectory with it."""
    sigmas = sampling.sigmas(6)
    whole = sampling.ours(sigmas=sigmas)
    left_over = sampling.ours(sigmas=sigmas[:4])
    still = [torch.zeros_like(x) for x in left_over]
    parts = sampling.ours(list(left_over), noise=still, sigmas=sigmas[3:])
    for ours, reference in zip(parts, whole):
        assert max_error(ours, reference) <= 1e-4


def test_no_noise_is_noise_of_the_first_stream_alone(sampling, comfy):
    """So ComfyUI 0.27 has it for a sampler that is to add none."""
    left_over = sampling.ours(sigmas=sampling.sigmas(6)[:4])
    guider = comfy.samplers.CFGGuider(sampling.model)
    guider.set_conds(sampling.conds("a red ball"), sampling.conds(""))
    guider.set_cfg(4.0)
    results = [
        guider.sample(
            noise,
            comfy.nested_tensor.NestedTensor(list(left_over)),
            comfy.samplers.sampler_object("euler"),
            sampling.sigmas(6)[3:],
            disable_pbar=True,
            seed=7,
        ).unbind()
        for noise in (
            torch.zeros_like(left_over[0]),
            comfy.nested_tensor.NestedTensor([torch.zeros_like(x) for x in left_over]),
        )
    ]
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_depth_has_a_denoise_of_its_own(sampling):
    """Of a start that both streams have, where the sampler begins half way."""
    from comfyui_nodes.latent_nodes import Trajectory

    given = sampling.pipeline.depth_processor.normalize(sampling.depth)[0]
    start = [torch.zeros_like(sampling.image_noise), given]
    changes = []
    for denoise in (0.0, 0.05, 0.9):
        (model,) = Trajectory.execute(sampling.model, 0.0, denoise).result
        depth = sampling.ours(start, model=model, sigmas=sampling.sigmas(6)[3:])[1]
        changes.append(float((depth - given).norm()))
    assert changes[1] < changes[0] and changes[1] < changes[2]
    whole = [sampling.ours(model=Trajectory.execute(sampling.model, 2.0, x).result[0]) for x in (0.0, 0.5)]
    assert torch.equal(whole[0][1], whole[1][1])  # from noise alone it has no say


def test_what_is_held_stays_so_under_another_noise_mask(sampling):
    """'Set Latent Noise Mask' replaces the mask of a latent: of the image, while depth is held on."""
    given, valid, _ = sampling.pipeline.depth_processor.normalize(sampling.depth)
    image = torch.randn(sampling.image_noise.shape, generator=torch.Generator().manual_seed(8))
    depth_held = torch.where(valid, held_at("soft"), 1.0)
    held = torch.cat([torch.ones_like(depth_held), depth_held], dim=1)
    mask = torch.ones(1, 1, *image.shape[-2:])
    mask[..., :3] = 0
    noise = [sampling.image_noise, sampling.depth_noise]
    ours = sampling.ours([image, given, held], mask, [*noise, torch.randn(held.shape)])
    assert len(ours) == 3 and torch.equal(ours[1], given) and torch.equal(ours[2], held)
    torch.testing.assert_close(ours[0][..., :3], image[..., :3])
    reference = sampling.ours([image, given], [mask, depth_held], noise)
    assert torch.equal(ours[0], reference[0])
    assert max_error(ours[0][..., 3:], sampling.ours([image, given], mask, noise)[0][..., 3:]) > 1e-2
    # In two stages, the second of which adds no noise, depth that is held needs its own.
    sigmas = sampling.sigmas(6)
    seeded = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=seeded) for x in (image, given, held)]
    whole = sampling.ours([image, given, held], noise=noise, sigmas=sigmas)
    half = sampling.ours([image, given, held], noise=noise, sigmas=sigmas[:4])
    rest = sampling.ours(list(half), noise=[torch.zeros_like(x) for x in noise], sigmas=sigmas[3:])
    for x, y in zip(rest, whole):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_mask_for_an_image_that_is_kept_is_said_to_have_no_say(sampling, caplog):
    image, depth = torch.ones_like(sampling.image_noise), torch.zeros_like(sampling.depth_noise)
    held = torch.cat([torch.zeros_like(depth), torch.ones_like(depth)], dim=1)
    mask = torch.ones(1, 1, *image.shape[-2:])
    mask[..., :2] = 0
    ours = sampling.ours([image, depth, held], mask, [sampling.image_noise, sampling.depth_noise, held])
    assert torch.equal(ours[0], image) and "no say over an image that is kept whole" in caplog.text


def test_a_run_within_a_run(sampling):
    """Two samplings of one model read nothing of each other."""
    given = torch.ones_like(sampling.image_noise)
    alone = sampling.ours()
    inner = []

    def callback(step, estimate, state, total_steps):
        if step == total_steps - 1:  # ComfyUI lets no other sampling of a model begin earlier
            depth = torch.zeros_like(sampling.depth_noise)
            mask = [torch.zeros_like(given), torch.ones_like(depth)]
            inner.extend(sampling.ours([given, depth], mask, log2_alpha=-5.0))

    outer = sampling.ours(callback=callback)
    assert torch.equal(inner[0], given)
    for x, y in zip(outer, alone):
        assert torch.equal(x, y)


# Other nodes' patches


def test_guidance_sees_one_stream_at_a_time(sampling):
    """Functions of other nodes are made for latents (B, C, h, w)."""
    seen = set()

    def look(args):
        seen.update((name, tuple(x.shape)) for name, x in args.items() if torch.is_tensor(x) and x.ndim > 1)
        return args

    def with_look(model):
        model.set_model_sampler_pre_cfg_function(lambda args: look(args)["conds_out"])
        model.set_model_sampler_cfg_function(
            lambda args: args["uncond"] + (look(args)["cond"] - args["uncond"]) * args["cond_scale"]
        )
        model.set_model_sampler_post_cfg_function(lambda args: look(args)["denoised"])
        return model

    patched = sampling.ours(model=with_look(sampling.model.clone()))
    shapes = {tuple(sampling.image_noise.shape), tuple(sampling.depth_noise.shape)}
    for name in ("input", "cond", "uncond", "cond_denoised", "denoised"):
        assert {shape for key, shape in seen if key == name} == shapes, name
    for x, y in zip(patched, sampling.ours()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_skip_layer_guidance(sampling, comfy):
    """The estimate without a block, from ComfyUI's node, is that of a transformer without it."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    (model,) = SkipLayerGuidanceDiT.execute(sampling.model, 2.0, 0.0, 1.0, "1", "0").result
    ours = sampling.ours(model=model, cfg=1.0, sigmas=torch.tensor([0.8, 0.0]), log2_alpha=0.0)
    whole = sampling.ours(cfg=1.0, sigmas=torch.tensor([0.8, 0.0]), log2_alpha=0.0)
    skipping = copy.deepcopy(sampling.pipeline.transformer)
    del skipping.transformer_blocks[1], skipping.single_transformer_blocks[0]
    level = torch.tensor([0.8])
    noisy = 0.8 * sampling.image_noise, 0.8 * sampling.depth_noise
    context = sampling.pipeline.encode_prompt("a red ball")[0]
    velocity, clean = call_library(skipping, *noisy, [level, level], context)
    for x, y, skipped in zip(ours, whole, (noisy[0] - 0.8 * velocity, clean)):
        assert max_error(x, y + 2 * (y - skipped)) <= 1e-4
        assert max_error(x, y) > 1e-2


def test_attention_patches(sampling):
    """Seen with every block, text, image and depth in one; what they change counts."""
    places, shapes = [], set()

    def before(q, k, v, pe=None, attn_mask=None, extra_options=None):
        places.append((extra_options["block_type"], extra_options["block_index"], tuple(extra_options["img_slice"])))
        shapes.add(tuple(q.shape[1:]))
        return {"q": q, "k": k, "v": v, "pe": pe, "attn_mask": attn_mask}

    same = sampling.model.clone()
    same.set_model_attn1_patch(before)
    for x, y in zip(sampling.ours(model=same), sampling.ours()):
        assert torch.equal(x, y)
    ((_, tokens, _),) = shapes
    image_tokens = sampling.image_noise[0, 0].numel()
    assert set(places) == {
        (kind, i, (tokens - 2 * image_tokens, tokens)) for kind in ("double", "single") for i in range(2)
    }
    changed = sampling.model.clone()
    changed.set_model_attn1_output_patch(lambda attended, extra_options: attended * 0)
    for x, y in zip(sampling.ours(model=changed), sampling.ours()):
        assert max_error(x, y) > 1e-2


def test_patches_without_a_place_are_said_to_be_left_out(sampling, caplog):
    model = sampling.model.clone()
    model.set_model_patch(lambda *args: args, "output_block_patch")
    model.set_model_patch_replace(lambda *args: args, "attn1", "middle", 0)
    for x, y in zip(sampling.ours(model=model), sampling.ours()):
        assert torch.equal(x, y)
    assert caplog.text.count("has no place for what a node patches (attn1, output_block_patch): it is left out.") == 1


def test_rescaled_and_damped_guidance(sampling):
    from comfy_extras.nodes_model_advanced import RescaleCFG
    from comfy_extras.nodes_tcfg import TCFG

    plain = sampling.ours()
    (damped,) = TCFG.execute(sampling.model).result
    for model in (RescaleCFG().patch(sampling.model, 0.7)[0], damped):
        for x, y in zip(sampling.ours(model=model), plain):
            assert torch.isfinite(x).all() and x.std() < 2 * y.std() and max_error(x, y) > 1e-5
    for x, y in zip(sampling.ours(model=RescaleCFG().patch(sampling.model, 0.0)[0]), plain):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_caches(sampling, comfy):
    """EasyCache reuses what the model says, of both streams; LazyCache cannot, and says so."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    calls = []
    settings = {"sigmas": sampling.sigmas(20), "cfg": 1.0}
    (cached,) = EasyCacheNode.execute(sampling.model, 0.3, 0.0, 1.0, False).result
    (careful,) = EasyCacheNode.execute(sampling.model, 0.0, 0.0, 1.0, False).result
    handle = sampling.model.model.diffusion_model.img_in.register_forward_hook(lambda *args: calls.append(1))
    try:
        plain = sampling.ours(**settings)
        assert len(calls) == 20
        for x, y in zip(sampling.ours(model=careful, **settings), plain):
            assert torch.equal(x, y)
        calls.clear()
        for x, y in zip(sampling.ours(model=cached, **settings), plain):
            assert (x - y).norm() < 0.3 * y.norm()
        assert 5 < len(calls) < 18
    finally:
        handle.remove()
    (lazy,) = LazyCacheNode.execute(sampling.model, 0.2, 0.15, 0.95, False).result
    with pytest.raises(ValueError, match="take EasyCache"):
        sampling.ours(model=lazy)


def test_sampling_that_another_node_replaced(sampling, comfy):
    """ModelSamplingFlux and its like put another object in the place of the model's: depth is as well with it."""
    import comfy.model_sampling as stock

    class Replaced(stock.ModelSamplingFlux, stock.CONST):
        pass

    model = sampling.model.clone()
    model.add_object_patch("model_sampling", Replaced(model.model.model_config))
    for ours, reference in zip(sampling.ours(model=model), sampling.ours()):
        assert torch.equal(ours, reference)
    start = sampling.ours(sigmas=sampling.sigmas(6)[:4])
    settings = {"noise": [torch.zeros_like(x) for x in start], "sigmas": sampling.sigmas(6)[3:]}
    for ours, reference in zip(
        sampling.ours(list(start), model=model, **settings), sampling.ours(list(start), **settings)
    ):
        assert torch.equal(ours, reference)


def test_preview_has_both_streams(sampling, model, monkeypatch):
    import latent_preview

    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    previewer = latent_preview.get_previewer("cpu", model.model.latent_format)
    seen = []

    def callback(step, estimate, state, total):
        # As in ComfyUI's own callback: since 0.28 it is handed the streams apart, and previews the first.
        estimate = estimate.unbind()[0] if estimate.is_nested else estimate
        seen.append(previewer.decode_latent_to_preview_image("JPEG", estimate)[1])

    sampling.ours(callback=callback)
    # Two latent cells a token, image left and depth right.
    assert len(seen) == 6 and seen[0].size == (2 * 2 * WIDTH // TOKEN, 2 * HEIGHT // TOKEN)
    depth = np.asarray(seen[-1])[:, 2 * WIDTH // TOKEN :]
    assert depth.std() > 0 and (depth[..., 0] == depth[..., 2]).all()


def test_latents_that_do_not_fit(sampling):
    image, depth = torch.zeros_like(sampling.image_noise), torch.zeros_like(sampling.depth_noise)
    for latent in ([image[:, :8], depth], [image, depth[..., :16]], [image, depth, depth]):
        with pytest.raises(ValueError, match="connect 'Empty RGB-D Latent' or 'Encode RGB-D' to the sampler"):
            sampling.ours(latent, noise=latent)
    with pytest.raises(ValueError, match="nothing is left to make"):
        sampling.ours([image, depth], [torch.zeros_like(image), torch.zeros_like(depth)])
    with pytest.raises(ValueError, match="takes no reference latents"):
        sampling.ours(prompt={"reference_latents": [image]})
    sampling.ours()  # and the next run is well
