"""Z-Image with depth inside ComfyUI, against the library."""

import os

import pytest
import torch
from comfyui_models import Sampling, call_both
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny import max_error, randomize
from tiny_z_image import TINY_Z_IMAGE, graft, make_z_image

from mf_diffusers import ModalityForcingZImageTransformer2DModel
from mf_diffusers.modality_forcing.latent_tokens import decode_latents, image_to_tokens, tokens_to_latents


if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("needs ComfyUI: set COMFYUI_PATH, and run in its Python environment", allow_module_level=True)
pytestmark = pytest.mark.comfyui
pytest_plugins = ["comfyui_models"]
# Position axes in Z-Image's own proportions, by which ComfyUI's model knows them, and text as wide as in `call_both`.
SIZES = TINY_Z_IMAGE | {"dim": 32, "axes_dims": [4, 6, 6], "cap_feat_dim": 48}
DEPTH = {"depth_channels": 16, "num_depth_decoder_layers": 1}


def make_transformer(**changes) -> ModalityForcingZImageTransformer2DModel:
    torch.manual_seed(0)
    return randomize(ModalityForcingZImageTransformer2DModel(**SIZES | DEPTH | changes)).eval()


@pytest.fixture(scope="module")
def transformer():
    return make_transformer()


@pytest.fixture(scope="module")
def file(transformer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    transformer.save_published(path)
    return path


@pytest.fixture(scope="module")
def model(comfy, file):
    return comfy.sd.load_diffusion_model(str(file))


# The transformer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"own_depth_modulation": True, "n_refiner_layers": 1},
        {"depth_timestep_mixing": False, "num_depth_decoder_layers": 3, "n_layers": 1},
    ],
)
def test_transformer_parity(comfy, tmp_path, changes):
    transformer = make_transformer(**changes)
    transformer.save_published(tmp_path / "model.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
    assert type(model.model).__name__ == "ModalityForcingZImage" and model.model.get_dtype() == torch.float32
    for ours, reference in call_both(model, transformer):
        assert max_error(ours, reference) <= 1e-4


def test_bfloat16_body_and_float32_head(comfy, tmp_path):
    transformer = make_transformer()
    transformer.to(torch.bfloat16).save_published(tmp_path / "model.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"), {"dtype": torch.bfloat16})
    assert {p.dtype for p in model.model.diffusion_model.depth_head.parameters()} == {torch.float32}
    assert model.model.diffusion_model.depth_embedder.weight.dtype == torch.bfloat16
    (velocity, reference), (depth, depth_reference) = call_both(model, transformer, torch.bfloat16)
    assert depth.dtype == torch.float32 and velocity.dtype == torch.bfloat16
    assert max_error(velocity.float(), reference.float()) <= 0.05 * reference.float().abs().max()
    assert max_error(depth, depth_reference) <= 0.05 * depth_reference.abs().max()


def test_partial_offload(comfy, file, transformer):
    model = comfy.sd.load_diffusion_model(str(file))
    model.load(torch.device("cpu"), lowvram_model_memory=model.model_size() // 2)
    for ours, reference in call_both(model, transformer):
        assert max_error(ours, reference) <= 1e-4


def test_z_images_own_lora(comfy, model, transformer):
    """In both spellings a LoRA changes the patched model as it changes the library's."""
    generator = torch.Generator().manual_seed(2)
    weights = dict(transformer.named_parameters())
    lora, merged = {}, {name: weight.clone() for name, weight in transformer.state_dict().items()}
    for name in ("layers.0.attention.to_q", "layers.2.attention.to_v", "layers.1.attention.to_out.0"):
        rows, columns = weights[f"{name}.weight"].shape
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        lora |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        merged[f"{name}.weight"] += 0.1 * up @ down
    up, down = torch.randn(96, 2, generator=generator), torch.randn(2, 32, generator=generator)
    fused = "diffusion_model.noise_refiner.0.attention.qkv"
    lora |= {f"{fused}.lora_A.weight": down, f"{fused}.lora_B.weight": up}
    for part, rows in zip("qkv", (0.1 * up @ down).chunk(3)):
        merged[f"noise_refiner.0.attention.to_{part}.weight"] += rows
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.1, 0.0)
    patched.patch_model()
    changed = make_transformer()
    changed.load_state_dict(merged)
    for ours, reference in call_both(patched, changed):
        assert max_error(ours, reference) <= 1e-4
    patched.unpatch_model()
    for ours, reference in call_both(model, transformer):
        assert max_error(ours, reference) <= 1e-4


def test_patches_of_other_nodes_are_called(model):
    """As by Z-Image: after each block, with the image's tokens alone; what they change is taken."""
    seen = []

    def patch(args):
        seen.append((args.get("block_type", "double_block"), args["block_index"], tuple(args["img"].shape)))
        assert args["img"].shape == args["img_input"].shape and args["pe"].shape[1] == args["img"].shape[1]
        assert args["x"].shape == (2, 4, 12, 16) and args["txt"].shape[1] == 32
        return {"img": args["img"] + 1.0}

    generator = torch.Generator().manual_seed(0)
    image, depth = torch.randn(2, 16, 6, 8, generator=generator), torch.randn(2, 1, 24, 32, generator=generator)
    levels, context = [torch.tensor([0.3, 0.8])] * 2, torch.randn(2, 7, 48, generator=generator)
    with torch.no_grad():
        plain = model.model.diffusion_model([image, depth], levels, context)
        options = {"patches": {"double_block": [patch], "noise_refiner": [patch]}}
        patched = model.model.diffusion_model([image, depth], levels, context, options)
    expected = [("noise_refiner", i) for i in range(2)] + [("double_block", i) for i in range(3)]
    assert [place[:2] for place in seen] == expected and {place[2] for place in seen} == {(2, 64, 32)}
    assert all(max_error(a, b) > 1e-2 for a, b in zip(plain, patched))


def test_the_published_size(comfy):
    """Every key of a graft onto Z-Image has its place, without a weight in memory; Z-Image itself is ComfyUI's."""
    with torch.device("meta"):
        transformer = ModalityForcingZImageTransformer2DModel()
    names = _original(transformer)
    config = comfy.model_detection.model_config_from_unet(names, "")
    assert type(config).__name__ == "ModalityForcingZImageConfig"
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(names, device=torch.device("meta"))
    assert {key: x.shape for key, x in model.diffusion_model.state_dict().items()} == {
        key: x.shape for key, x in names.items()
    }
    assert model.latent_format.latent_channels == 64 and model.latent_format.spacial_downscale_ratio == 16
    stock = comfy.supported_models.ZImage({"dim": 3840}).memory_usage_factor
    assert model.memory_usage_factor * (64 + 256) == pytest.approx(2 * 4 * stock)
    without = {key: tensor for key, tensor in names.items() if "depth" not in key}
    assert type(comfy.model_detection.model_config_from_unet(without, "")).__name__ == "ZImage"


def _original(transformer) -> dict:
    from mf_diffusers.modality_forcing.transformer_z_image import original_names

    weights = transformer.state_dict()
    names = original_names(weights)
    return {name: torch.cat([weights[part] for part in parts]) for name, parts in names.items()}


def test_weights_that_are_not_whole(comfy, file):
    weights = load_file(file)
    del weights["layers.0.attention.q_norm.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.q_norm\.weight is missing"):
        comfy.sd.load_diffusion_model_state_dict(weights)


# Sampling


class ZImageSampling(Sampling):
    def conds(self, prompt, **options):
        """Features of the prompt's own tokens, as ComfyUI's text encoder makes them."""
        features = self.pipeline.encode_prompt(prompt)[0].detach()
        return [[features[:, : int(features[0].any(-1).sum())], options]]


@pytest.fixture(scope="module")
def sampling(comfy, tmp_path_factory):
    base = make_z_image()
    sizes = SIZES | {"cap_feat_dim": 16}
    base.transformer = randomize(type(base.transformer)(**sizes)).eval()
    pipeline = graft(base)
    randomize(pipeline.transformer)
    pipeline.register_modules(depth_scheduler=type(pipeline.scheduler)(shift=6.0))  # ComfyUI walks one schedule
    path = tmp_path_factory.mktemp("models") / "pipeline.safetensors"
    pipeline.transformer.save_published(path)
    model = comfy.sd.load_diffusion_model(str(path))
    model.model.model_sampling.set_parameters(shift=6.0, multiplier=1.0)
    return ZImageSampling(comfy, model, pipeline)


@pytest.mark.parametrize("log2_alpha", [None, -5.0])
def test_joint(sampling, log2_alpha):
    noise = {"latents": sampling.image_noise, "depth_latents": sampling.depth_noise, "guidance_scale": 4.0}
    sampling.check(sampling.ours(log2_alpha=log2_alpha), sampling.library(log2_alpha=log2_alpha, **noise))


def test_image_to_depth(sampling):
    tokens = image_to_tokens(sampling.pipeline.vae, sampling.image).detach()
    given = tokens.transpose(1, 2).unflatten(2, sampling.image_noise.shape[-2:])
    ours = sampling.ours(
        latent=[given, torch.zeros_like(sampling.depth_noise)],
        mask=[torch.zeros_like(given[:, :1]), torch.ones_like(sampling.depth_noise)],
        cfg=1.0,
    )
    reference = sampling.library(image=sampling.image, depth_latents=sampling.depth_noise)
    assert torch.equal(ours[0], given)
    depth = sampling.pipeline.depth_processor.patchify(ours[1])
    assert max_error(depth, reference[1]) <= 1e-4


@torch.no_grad()
def test_nodes_with_flux1s_autoencoder(comfy, tmp_path):
    """Encoded, split, joined and decoded with ComfyUI's class of Z-Image's VAE: the library's tokens and pictures."""
    from comfyui_nodes.latent_nodes import Decode, Encode, Join, Split

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    vae = comfy.sd.VAE(sd=autoencoder.state_dict())
    make_transformer(in_channels=16, depth_channels=256).save_published(tmp_path / "model.safetensors")
    model = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))

    image = torch.rand(1, 32, 48, 3)
    latent = Encode.execute(model, "image", "rigid", False, 48, vae=vae, image=image).result[0]
    cells, depth = latent["samples"].unbind()[:2]
    assert cells.shape == (1, 64, 2, 3) and depth.shape == (1, 1, 32, 48)
    tokens = image_to_tokens(autoencoder, image.movedim(-1, 1))
    assert max_error(cells.flatten(2).transpose(1, 2), tokens) <= 1e-3
    parts = Split.execute(latent).result
    assert parts[0]["samples"].shape == (1, 16, 4, 6)
    assert max_error(Join.execute(*parts).result[0]["samples"].unbind()[0], cells) <= 1e-5
    picture = Decode.execute(latent, vae).result[0]
    expected = decode_latents(autoencoder, tokens_to_latents(autoencoder, tokens, 2, 3)) / 2 + 0.5
    assert max_error(picture, expected.movedim(1, -1)) <= 1e-2
    assert model.model.latent_format.image_picture(cells).shape == (1, 3, 4, 6)


def test_save_file_round_trip(model, transformer, tmp_path, comfy):
    """What ComfyUI's own save node writes opens again."""
    weights = model.model.state_dict_for_saving(model.model.diffusion_model.state_dict())
    save_file({key: x.contiguous() for key, x in weights.items()}, tmp_path / "saved.safetensors")
    saved = comfy.sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    for ours, reference in call_both(saved, transformer):
        assert max_error(ours, reference) <= 1e-4
