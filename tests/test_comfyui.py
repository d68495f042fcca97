"""The node pack in a ComfyUI server: graphs through POST /prompt to files on disk."""

import itertools
import math
import os
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from comfyui_server import Graph, PromptError, Server
from PIL import Image
from safetensors.torch import save_file
from tiny import TINY_TRANSFORMER, make_pipeline

from mf_diffusers import ModalityForcingFlux2Transformer2DModel
from mf_diffusers.depth_io import read_depth, write_depth
from mf_diffusers.embedded import EMBEDDED_MODEL
from mf_diffusers.modality_forcing.conversion import export_published_transformer


COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("needs ComfyUI: set COMFYUI_PATH, and run in its Python environment", allow_module_level=True)
pytestmark = pytest.mark.comfyui
PROMPT = "a red ball"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def server(pipeline, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    server = Server(Path(COMFYUI), base)
    try:
        pipeline.save_pretrained(base / "models" / "diffusers" / "tiny")
        pipeline.transformer.save_published(base / "models" / "diffusion_models" / "tiny.safetensors", prefix="")
        save_file(make_lora(pipeline.transformer), base / "models" / "loras" / "klein.safetensors")
        save_file(make_flux2(), base / "models" / "diffusion_models" / "flux2.safetensors")
        make_inputs(base / "input")
        server.wait()
        yield server
    finally:
        server.stop()


def make_lora(transformer):
    """A LoRA as diffusers saves it."""
    generator, lora = torch.Generator().manual_seed(2), {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"):
        rows, columns = transformer.get_submodule(name).weight.shape
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    return lora


def make_flux2():
    """A FLUX.2 without depth, small."""
    small = {"in_channels": 128, "num_attention_heads": 1, "attention_head_dim": 128, "axes_dims_rope": (32,) * 4}
    model = ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER | small)
    weights = export_published_transformer(model.state_dict(), prefix="")
    return {key: x for key, x in weights.items() if "depth" not in key and "cross_alpha" not in key}


def make_inputs(folder):
    rows, columns = np.mgrid[:38, :50].astype(np.float32)
    depth = 2 + rows / 20 + np.sin(columns / 9)
    depth[5:9, 20:30] = 0
    for suffix in ("npy", "exr", "png"):
        write_depth(folder / f"depth.{suffix}", depth)
    picture = np.stack([rows * 6, columns * 5, 255 - rows * 6], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(folder / "photo.png")
    Image.fromarray(picture[:30]).save(folder / "other_size.png")


class TinyGraph(Graph):
    """A graph around the tiny pipeline."""

    COUNT = itertools.count()

    def __init__(self):
        super().__init__()
        self.name = next(self.COUNT)  # in names of files: what ComfyUI has cached is not written anew
        self.loader = self.add("ModalityForcingLoadPipeline", pipeline="tiny")
        self.model, self.clip, self.vae = self.loader[0], self.loader[1], self.loader[2]

    def empty(self, pipeline=None, **changes):
        model = self.add("ModalityForcingLoadPipeline", pipeline=pipeline)[0] if pipeline else self.model
        inputs = {"width": 32, "height": 24, "batch_size": 1} | changes
        return self.add("ModalityForcingEmptyLatent", model=model, **inputs)[0]

    def encode(self, keep="what is connected", depth_strength="rigid", inverse_depth=False, size=32, **inputs):
        return self.add(
            "ModalityForcingEncode",
            model=self.model,
            keep=keep,
            depth_strength=depth_strength,
            inverse_depth=inverse_depth,
            size=size,
            **inputs,
        )[0]

    def prompts(self):
        texts = {"positive": PROMPT, "negative": ""}
        return {name: self.add("CLIPTextEncode", clip=self.clip, text=text)[0] for name, text in texts.items()}

    def sample_part(self, latent, add_noise, start, end, leftover):
        return self.add(
            "KSamplerAdvanced",
            model=self.model,
            **self.prompts(),
            latent_image=latent,
            add_noise=add_noise,
            noise_seed=7,
            steps=4,
            cfg=4.0,
            sampler_name="euler",
            scheduler="simple",
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise=leftover,
        )[0]

    def sample(self, latent, model=None, sampler="euler", scheduler="simple", steps=4, cfg=4.0, denoise=1.0):
        return self.add(
            "KSampler",
            model=model or self.model,
            **self.prompts(),
            latent_image=latent,
            seed=7,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=denoise,
        )[0]

    def decode(self, latent, vae=True):
        node = self.add("ModalityForcingDecode", latent=latent, **{"vae": self.vae} if vae else {})
        return node[0], node[1], node[2]

    def save_image(self, images):
        return self.add("SaveImage", images=images, filename_prefix=f"{self.name}-image").name

    def save_depth(self, depth):
        format = {"format": "exr", "format.bit_depth": "32-bit float", "format.input_color_space": "linear"}
        return self.add("SaveImageAdvanced", images=depth, filename_prefix=f"{self.name}-depth", **format).name

    def load_image(self, name="photo.png"):
        return self.add("LoadImage", image=name)[0]

    def load_depth(self, name="depth.npy", scale=0.0, missing_value=0.0):
        node = self.add("ModalityForcingLoadDepth", file=name, scale=scale, missing_value=missing_value)
        return node[0], node[1]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def depth_of(path):
    """All that is in the file: a random model's far end looks like a renderer's background."""
    return read_depth(path, maximum=math.inf)


# Graphs that run


def test_text_to_image_depth_and_points(server):
    graph = TinyGraph()
    image, depth, valid = graph.decode(graph.sample(graph.empty(batch_size=2)))
    picture = graph.add("ModalityForcingDepthPicture", depth=depth, valid=valid, colormap="gray (near bright)")[0]
    points = graph.add("ModalityForcingDepthPoints", depth=depth, image=image, fov=55.0, edge_threshold=0.0)
    normals = graph.add("MoGeRender", moge_geometry=points[1], output="normal_opengl")[0]
    mesh = graph.add(
        "MoGePointMapToMesh",
        moge_geometry=points[1],
        batch_index=1,
        decimation=1,
        discontinuity_threshold=0.0,
        texture=True,
    )[0]
    saved = {
        "image": graph.save_image(image),
        "depth": graph.save_depth(depth),
        "picture": graph.save_image(picture),
        "normals": graph.save_image(normals),
        "points": graph.add("SaveGLB", mesh=points[0], filename_prefix=f"{graph.name}-points").name,
        "mesh": graph.add("SaveGLB", mesh=mesh, filename_prefix=f"{graph.name}-mesh").name,
    }
    files = server.run(graph.nodes)
    for name in ("image", "picture", "normals"):
        assert [pixels(path).shape for path in files[saved[name]]] == [(24, 32, 3)] * 2
    maps = [depth_of(path) for path in files[saved["depth"]]]
    assert all(depth.shape == (24, 32) and depth.min() > 0 for depth in maps)
    assert not np.array_equal(*maps)
    clouds = [trimesh.load(path) for path in files[saved["points"]]]
    assert [len(cloud.vertices) for cloud in clouds] == [24 * 32] * 2
    assert np.allclose(-clouds[1].vertices[:, 2], maps[1].ravel(), rtol=1e-4)
    assert trimesh.load(files[saved["mesh"]][0]).bounds is not None


@torch.no_grad()
def test_the_same_seed_gives_the_librarys_result(server, pipeline):
    graph = TinyGraph()
    image, depth, _ = graph.decode(graph.sample(graph.empty()))
    saved = graph.save_image(image), graph.save_depth(depth)
    files = server.run(graph.nodes)
    generator = torch.Generator().manual_seed(7)
    output = pipeline(PROMPT, height=24, width=32, num_inference_steps=4, generator=generator)
    assert np.abs(pixels(files[saved[0]][0]).astype(int) - np.asarray(output.images[0])).max() <= 1
    ours = depth_of(files[saved[1]][0])
    assert np.abs(ours - output.depth[0])[output.depth_mask[0]].max() <= 1e-3 * output.depth[0].max()


def test_photos_to_depth(server):
    graph = TinyGraph()
    photos = graph.add("RepeatImageBatch", image=graph.load_image(), amount=2)[0]
    latent = graph.sample(graph.encode(image=photos, vae=graph.vae), steps=2, cfg=1.0)
    _, depth, valid = graph.decode(latent, vae=False)
    saved = graph.save_depth(depth), graph.save_image(graph.add("MaskToImage", mask=valid)[0])
    files = server.run(graph.nodes)
    maps = [depth_of(path) for path in files[saved[0]]]
    assert [depth.shape for depth in maps] == [(38, 50)] * 2 and not np.array_equal(*maps)
    assert pixels(files[saved[1]][0]).shape == (38, 50, 3)


def test_depth_to_image_follows_its_strength(server):
    graph, saved = TinyGraph(), {}
    depth, valid = graph.load_depth("depth.exr")
    for strength in ("rigid", "tight", "loose"):
        latent = graph.encode(depth=depth, depth_mask=valid, depth_strength=strength)
        image, kept, _ = graph.decode(graph.sample(latent))
        saved[strength] = graph.save_image(image), graph.save_depth(kept)
    files = server.run(graph.nodes)
    images = {strength: pixels(files[image][0]).astype(int) for strength, (image, _) in saved.items()}
    assert all(image.shape == (38, 50, 3) for image in images.values())
    away = {strength: np.abs(images[strength] - images["rigid"]).mean() for strength in ("tight", "loose")}
    assert 0 < away["tight"] < away["loose"]
    # Depth that was given comes back in its own unit, but for the resampling.
    given, kept = depth_of(server.base / "input" / "depth.npy"), depth_of(files[saved["rigid"][1]][0])
    below_the_hole = slice(14, -2), slice(2, -2)
    assert np.abs(kept[below_the_hole] / given[below_the_hole] - 1).max() < 0.1


def test_refine_and_restyle(server):
    """Depth made anew for the image of a finished run; both changed a little; a photo restyled through its depth."""
    graph = TinyGraph()
    first = graph.sample(graph.empty())
    refined = graph.sample(graph.encode(latent=first, keep="image"), steps=2, cfg=1.0)
    changed = graph.sample(graph.encode(latent=first, keep="nothing"), denoise=0.5)
    latents = {"first": first, "refined": refined, "changed": changed}
    saved = {}
    for name, latent in latents.items():
        image, depth, _ = graph.decode(latent)
        saved[name] = graph.save_image(image), graph.save_depth(depth)
    estimate = graph.sample(graph.encode(image=graph.load_image(), vae=graph.vae), steps=2, cfg=1.0)
    _, depth, valid = graph.decode(estimate, vae=False)
    restyled = graph.save_image(graph.decode(graph.sample(graph.encode(depth=depth, depth_mask=valid)))[0])
    files = server.run(graph.nodes)
    image = {name: pixels(files[names[0]][0]) for name, names in saved.items()}
    depth = {name: depth_of(files[names[1]][0]) for name, names in saved.items()}
    assert np.array_equal(image["first"], image["refined"]) and not np.array_equal(depth["first"], depth["refined"])
    assert not np.array_equal(image["first"], image["changed"])
    assert not np.array_equal(depth["first"], depth["changed"])
    assert pixels(files[restyled][0]).shape == (38, 50, 3)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("dpmpp_2m", "karras"), ("euler_ancestral", "beta"), ("heun", "normal"), ("uni_pc", "simple")],
)
def test_stock_samplers_and_trajectory(server, sampler, scheduler):
    graph, saved = TinyGraph(), []
    for log2_alpha in (5.0, -5.0):
        model = graph.add("ModalityForcingTrajectory", model=graph.model, log2_alpha=log2_alpha)[0]
        image, depth, _ = graph.decode(graph.sample(graph.empty(), model, sampler, scheduler))
        saved.append(graph.save_depth(depth))
        graph.save_image(image)
    files = server.run(graph.nodes)
    maps = [depth_of(files[name][0]) for name in saved]
    assert all(np.isfinite(depth).all() and depth.std() > 0 for depth in maps) and not np.array_equal(*maps)


def test_custom_sampler(server):
    """The advanced sampler: its estimate of the clean latent is one, too, in the latent's own space."""
    graph = TinyGraph()
    positive = graph.add("CLIPTextEncode", clip=graph.clip, text=PROMPT)[0]
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=7)[0],
        guider=graph.add("BasicGuider", model=graph.model, conditioning=positive)[0],
        sampler=graph.add("KSamplerSelect", sampler_name="euler")[0],
        sigmas=graph.add("BasicScheduler", model=graph.model, scheduler="simple", steps=4, denoise=1.0)[0],
        latent_image=graph.empty(),
    )
    saved = [graph.save_depth(graph.decode(sampled[i])[1]) for i in range(2)]
    saved.append(graph.save_depth(graph.decode(graph.sample(graph.empty(), cfg=1.0))[1]))
    files = server.run(graph.nodes)
    maps = [depth_of(files[name][0]) for name in saved]
    assert np.array_equal(maps[0], maps[2])
    assert np.allclose(maps[0], maps[1], rtol=1e-4)  # after the last step the estimate is the result


@pytest.mark.parametrize("noise", ["KSamplerAdvanced", "DisableNoise"])
def test_two_stages(server, noise):
    """The second adds no noise, and goes on where the first left off."""
    graph = TinyGraph()
    whole = graph.sample(graph.empty(), sampler="euler")
    if noise == "KSamplerAdvanced":
        first = graph.sample_part(graph.empty(), "enable", 0, 2, "enable")
        parts = graph.sample_part(first, "disable", 2, 1000, "disable")
    else:
        sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="simple", steps=4, denoise=1.0)[0]
        halves = graph.add("SplitSigmas", sigmas=sigmas, step=2)
        parts = graph.empty()
        for half, source in ((0, graph.add("RandomNoise", noise_seed=7)), (1, graph.add("DisableNoise"))):
            parts = graph.add(
                "SamplerCustomAdvanced",
                noise=source[0],
                guider=graph.add("CFGGuider", model=graph.model, **graph.prompts(), cfg=4.0)[0],
                sampler=graph.add("KSamplerSelect", sampler_name="euler")[0],
                sigmas=halves[half],
                latent_image=parts,
            )[0]
    saved = [graph.save_depth(graph.decode(latent)[1]) for latent in (whole, parts)]
    images = [graph.save_image(graph.decode(latent)[0]) for latent in (whole, parts)]
    files = server.run(graph.nodes)
    maps = [depth_of(files[name][0]) for name in saved]
    assert np.allclose(*maps, rtol=1e-3)
    assert np.abs(np.subtract(*(pixels(files[name][0]).astype(int) for name in images))).max() <= 1


def test_inpainting_over_kept_depth(server):
    """A noise mask of ComfyUI's own node is for the image; depth that 'Encode RGB-D' keeps is kept."""
    graph = TinyGraph()
    depth, valid = graph.load_depth()
    encoded = graph.encode(image=graph.load_image(), depth=depth, depth_mask=valid, vae=graph.vae, keep="depth")
    left = graph.add("SolidMask", value=0.0, width=50, height=38)[0]
    right = graph.add("SolidMask", value=1.0, width=25, height=38)[0]
    mask = graph.add("MaskComposite", destination=left, source=right, x=25, y=0, operation="add")[0]
    masked = graph.add("SetLatentNoiseMask", samples=encoded, mask=mask)[0]
    saved = {}
    for name, latent in {"given": encoded, "made": graph.sample(encoded), "masked": graph.sample(masked)}.items():
        image, depth, _ = graph.decode(latent)
        saved[name] = graph.save_image(image), graph.save_depth(depth)
    files = server.run(graph.nodes)
    image = {name: pixels(files[names[0]][0]).astype(int) for name, names in saved.items()}
    depth = {name: depth_of(files[names[1]][0]) for name, names in saved.items()}
    assert np.array_equal(depth["masked"], depth["given"]) and np.array_equal(depth["made"], depth["given"])
    # Its latents are kept (see test_comfyui_model); this decoder's attention carries the other side over.
    left = {name: np.abs(image[name] - image["given"])[:, :12].mean() for name in ("masked", "made")}
    assert left["masked"] < 0.8 * left["made"]
    assert np.abs(image["masked"] - image["given"])[:, 30:].mean() > 5
    assert np.abs(image["masked"] - image["made"]).mean() > 5


def test_inpainting_to_files(server):
    """Under fixed geometry, by the node's own mask; then fog over the result, and depth of copies in one map."""
    graph = TinyGraph()
    depth, valid = graph.load_depth()
    photo = graph.load_image()
    mask = graph.add("SolidMask", value=0.0, width=50, height=38)[0]
    part = graph.add("SolidMask", value=1.0, width=25, height=38)[0]
    mask = graph.add("MaskComposite", destination=mask, source=part, x=25, y=0, operation="add")[0]
    encoded = graph.encode(image=photo, image_mask=mask, depth=depth, depth_mask=valid, vae=graph.vae)
    decoded = graph.add("ModalityForcingDecode", latent=graph.sample(encoded), vae=graph.vae)
    fog = graph.add("ModalityForcingDepthMask", depth=decoded[3], near=2.0, far=4.0, shape="ramp")[0]
    photos = graph.add("RepeatImageBatch", image=photo, amount=3)[0]
    samples = graph.decode(graph.sample(graph.encode(image=photos, vae=graph.vae), steps=1, cfg=1.0), vae=False)
    ensemble = graph.add("ModalityForcingEnsembleDepth", depth=samples[1], valid=samples[2])
    one_range = graph.add(
        "ModalityForcingDepthPicture", depth=samples[1], colormap="gray (far bright)", range="whole batch"
    )
    saved = {
        "image": graph.save_image(decoded[0]),
        "depth": graph.save_depth(decoded[1]),
        "fog": graph.save_image(graph.add("MaskToImage", mask=fog)[0]),
        "ensemble": graph.save_depth(ensemble[0]),
        "uncertainty": graph.save_depth(ensemble[3]),
        "pictures": graph.save_image(one_range[0]),
    }
    files = server.run(graph.nodes)
    image, given = pixels(files[saved["image"]][0]), pixels(server.base / "input" / "photo.png")
    assert np.array_equal(image[:, :25], given[:, :25]) and not np.array_equal(image[:, 25:], given[:, 25:])
    depth, given = depth_of(files[saved["depth"]][0]), depth_of(server.base / "input" / "depth.npy")
    assert np.allclose(depth[given > 0], given[given > 0], rtol=1e-6)
    fog = pixels(files[saved["fog"]][0])[..., 0]
    assert np.abs(fog / 255 - ((given - 2) / 2).clip(0, 1))[given > 0].max() <= 1 / 255
    assert len(files[saved["ensemble"]]) == 1 and depth_of(files[saved["uncertainty"]][0]).max() > 0
    assert len(files[saved["pictures"]]) == 3


def test_single_file_lora_and_fp8(server):
    """The stock loaders: the exported file is the pipeline's model, a LoRA and fp8 storage change it."""
    graph = TinyGraph()
    single = graph.add("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")[0]
    models = {
        "pipeline": graph.model,
        "single": single,
        "fp8": graph.add("UNETLoader", unet_name="tiny.safetensors", weight_dtype="fp8_e4m3fn")[0],
        "lora": graph.add("LoraLoaderModelOnly", model=single, lora_name="klein.safetensors", strength_model=1.0)[0],
    }
    saved = {}
    for name, model in models.items():
        image, depth, _ = graph.decode(graph.sample(graph.empty(), model))
        saved[name] = graph.save_image(image), graph.save_depth(depth)
    files = server.run(graph.nodes)
    image = {name: pixels(files[names[0]][0]) for name, names in saved.items()}
    depth = {name: depth_of(files[names[1]][0]) for name, names in saved.items()}
    assert np.array_equal(image["pipeline"], image["single"]) and np.array_equal(depth["pipeline"], depth["single"])
    for name in ("fp8", "lora"):
        assert not np.array_equal(image["single"], image[name]) and not np.array_equal(depth["single"], depth[name])


@pytest.mark.parametrize("suffix", ["npy", "exr", "png"])
def test_depth_files(server, suffix):
    graph = TinyGraph()
    depth, valid = graph.load_depth(f"depth.{suffix}", scale=0.0 if suffix == "png" else 2.0)
    saved = graph.save_depth(depth), graph.save_image(graph.add("MaskToImage", mask=valid)[0])
    files = server.run(graph.nodes)
    given = depth_of(server.base / "input" / "depth.npy")
    assert np.allclose(depth_of(files[saved[0]][0]), given * (1 if suffix == "png" else 2), atol=1e-4)
    assert np.array_equal(pixels(files[saved[1]][0])[..., 0] > 0, given > 0)


# Graphs that fail


def fails(server, message, build):
    graph = TinyGraph()
    build(graph)
    with pytest.raises(PromptError, match=message):
        server.run(graph.nodes)


def flux2(graph):
    return graph.add("UNETLoader", unet_name="flux2.safetensors", weight_dtype="default")[0]


def plain_latent(graph):
    return graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)[0]


def black(graph):
    return graph.add("EmptyImage", width=50, height=38, batch_size=1, color=0)[0]


def whole(graph):
    return graph.add("EmptyImage", width=50, height=38, batch_size=1, color=0x101010)[0]


def repeated(graph, image, amount):
    return graph.add("RepeatImageBatch", image=image, amount=amount)[0]


FAULTS = {
    "a model without depth": (
        r"\(Flux2\) has no depth stream: connect a Modality Forcing model",
        lambda g: g.save_image(
            g.decode(g.sample(g.empty(), g.add("ModalityForcingTrajectory", model=flux2(g), log2_alpha=5.0)[0]))[0]
        ),
    ),
    "sizes that differ": (
        "The image is 30x50 and the depth 38x50",
        lambda g: g.save_depth(
            g.decode(g.encode(image=g.load_image("other_size.png"), depth=g.load_depth()[0], keep="nothing"), False)[1]
        ),
    ),
    "a colour picture as depth": (
        "A colour picture is connected as depth",
        lambda g: g.save_depth(g.decode(g.encode(depth=g.load_image()), False)[1]),
    ),
    "a colour picture as depth file": (
        "photo.png: a coloured depth picture carries no depth values",
        lambda g: g.save_depth(g.load_depth("photo.png")[0]),
    ),
    "depth without a valid pixel": (
        "Depth map 0 of the batch has no valid pixel",
        lambda g: g.save_depth(g.decode(g.encode(depth=black(g)), False)[1]),
    ),
    "a plain latent to the sampler": (
        "connect 'Empty RGB-D Latent' or 'Encode RGB-D' to the sampler",
        lambda g: g.save_depth(g.decode(g.sample(plain_latent(g)), False)[1]),
    ),
    "a plain latent to the decoder": (
        "no depth in it: connect one from 'Empty RGB-D Latent'",
        lambda g: g.save_depth(g.decode(plain_latent(g), False)[1]),
    ),
    "batches that differ": (
        "2 images do not go with 3 depth maps",
        lambda g: g.save_depth(
            g.decode(
                g.encode(
                    image=repeated(g, g.load_image(), 2),
                    depth=repeated(g, g.load_depth()[0], 3),
                    vae=g.vae,
                    keep="nothing",
                ),
                False,
            )[1]
        ),
    ),
    "a mask of another size": (
        r"mask has shape \[1, 8, 8\]",
        lambda g: g.save_depth(
            g.decode(
                g.encode(depth=g.load_depth()[0], depth_mask=g.add("SolidMask", value=1.0, width=8, height=8)[0]),
                False,
            )[1]
        ),
    ),
    "a mask without depth": (
        "A mask of depth is connected, but no depth",
        lambda g: g.save_depth(
            g.decode(g.encode(image=g.load_image(), vae=g.vae, depth_mask=g.load_depth()[1]), False)[1]
        ),
    ),
    "no VAE": (
        "An image is connected, but no VAE",
        lambda g: g.save_depth(g.decode(g.encode(image=g.load_image()), False)[1]),
    ),
    "an image without a VAE to decode it": (
        "The image is wanted, but no VAE is connected",
        lambda g: g.save_image(g.decode(g.sample(g.empty()), vae=False)[0]),
    ),
    "nothing": ("Nothing is connected", lambda g: g.save_depth(g.decode(g.encode(), False)[1])),
    "both": (
        "Say what to `keep`",
        lambda g: g.save_depth(g.decode(g.encode(image=g.load_image(), depth=whole(g), vae=g.vae), False)[1]),
    ),
    "what is not there to keep": (
        "`keep` is 'depth', but there is none",
        lambda g: g.save_depth(g.decode(g.encode(image=g.load_image(), vae=g.vae, keep="depth"), False)[1]),
    ),
    "too long and thin": (
        "too long and thin",
        lambda g: g.save_depth(
            g.decode(g.encode(depth=g.add("EmptyImage", width=4000, height=1, batch_size=1, color=0x010101)[0]), False)[
                1
            ]
        ),
    ),
    "an absent file": ("There is no file absent.npy", lambda g: g.save_depth(g.load_depth("absent.npy")[0])),
    "a file outside": (
        r"\.\./server.log lies outside ComfyUI's folders",
        lambda g: g.save_depth(g.load_depth("../server.log")[0]),
    ),
    "a pipeline that is not there": (
        "not in list",
        lambda g: g.save_depth(g.decode(g.empty("../elsewhere"), False)[1]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_clear_message(server, fault):
    fails(server, *FAULTS[fault])


@pytest.mark.skipif(EMBEDDED_MODEL.is_dir(), reason="this installation has the embedded model")
def test_no_embedded_model(server):
    fails(
        server,
        "This installation has no embedded model .* open a single file by 'Load Diffusion Model'",
        lambda g: g.save_depth(g.decode(g.empty("embedded model (small, on board)"), False)[1]),
    )


def test_the_server_lives_on(server):
    fails(server, *FAULTS["a plain latent to the sampler"])
    graph = TinyGraph()
    saved = graph.save_depth(graph.decode(graph.sample(graph.empty(width=41, height=27)))[1])
    assert depth_of(server.run(graph.nodes)[saved][0]).shape == (27, 41)  # made at 28 x 40


# What the editor sees


def test_object_info(server):
    nodes = {name: info for name, info in server.get("/object_info").items() if name.startswith("ModalityForcing")}
    assert len(nodes) == 14
    for name, info in nodes.items():
        assert info["display_name"] and info["description"] and info["search_aliases"], name
        assert info["category"] == "Modality Forcing"
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        for socket, (kind, options) in inputs.items():
            assert len(options["tooltip"]) > 10, (name, socket)
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], (name, socket)
            if kind == "COMBO":
                assert options["options"] and options.get("default", options["options"][0]) in options["options"]
        # Outputs of the same type are told apart by a tooltip.
        kinds = info["output"]
        assert all(tip for kind, tip in zip(kinds, info["output_tooltips"]) if kinds.count(kind) > 1), name
        with urllib.request.urlopen(
            f"http://127.0.0.1:{server.port}/extensions/mf_diffusers/docs/{name}.md", timeout=30
        ) as page:
            assert info["display_name"] in page.read().decode()
    assert set(nodes["ModalityForcingLoadPipeline"]["input"]["required"]["pipeline"][1]["options"]) >= {"tiny"}


def test_the_pack_imports_without_a_word(server):
    log, _, _ = server.log.read_text().partition("To see the GUI")
    assert re.search(r"seconds: \S*mf_diffusers\s", log)
    for word in ("IMPORT FAILED", "Modality Forcing", "unet missing", "unet unexpected"):
        assert word not in log


OTHER_CORES = {
    "older": (
        {"comfyui_version.py": lambda source: '__version__ = "0.26.3"\n'},
        "Modality Forcing needs ComfyUI 0.27 or newer, and this is 0.26.3: update ComfyUI.",
    ),
    "newer": (
        {
            "comfyui_version.py": lambda source: '__version__ = "0.99.0"\n',
            "latent_preview.py": lambda source: source.replace("Latent2RGBPreviewer", "LinearPreviewer"),
        },
        "ComfyUI 0.99.0 has changed what Modality Forcing leans on, so that the whole pack may not work "
        "(latent_preview.Latent2RGBPreviewer; tested with ComfyUI 0.27 to 0.33): update the pack.",
    ),
}


@pytest.mark.parametrize(("files", "line"), OTHER_CORES.values(), ids=OTHER_CORES)
def test_another_core_gets_one_line(tmp_path, files, line):
    """And no node, and no traceback."""
    (tmp_path / "core").mkdir()
    files = {"main.py": lambda source: source} | files  # Python looks for modules beside the file itself, not the link
    for name in os.listdir(COMFYUI):
        if name in files:
            (tmp_path / "core" / name).write_text(files[name](Path(COMFYUI, name).read_text()))
        else:
            (tmp_path / "core" / name).symlink_to(Path(COMFYUI, name))
    server = Server(tmp_path / "core", tmp_path / "base")
    try:
        server.wait()
        assert not any(name.startswith("ModalityForcing") for name in server.get("/object_info"))
        log = server.log.read_text()
        assert log.count("Modality Forcing") == log.count(line) == 1
        assert "IMPORT FAILED" not in log and "Traceback" not in log
    finally:
        server.stop()
