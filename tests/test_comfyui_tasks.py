"""What is given in part, in ComfyUI against the library; RGB-D latents in the core's own latent nodes; regions."""

import os
from types import SimpleNamespace

import pytest
import torch


if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("needs ComfyUI: set COMFYUI_PATH, and run in its Python environment", allow_module_level=True)
pytestmark = pytest.mark.comfyui

from comfyui_models import HEIGHT, TOKEN, WIDTH, Sampling  # noqa: E402
from tiny import close_depth, max_error  # noqa: E402


pytest_plugins = ["comfyui_models"]


@pytest.fixture(scope="module")
def loaded(comfy, pipeline, tmp_path_factory):
    """The pipeline as ComfyUI has it: model and vae."""
    from comfyui_nodes.latents import explain_streams
    from comfyui_nodes.loader import load_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    explain_streams()
    model, _, vae = load_pipeline(folder)
    return SimpleNamespace(model=model, vae=vae)


@pytest.fixture(scope="module")
def sampling(comfy, loaded, pipeline):
    return Sampling(comfy, loaded.model, pipeline)


@pytest.fixture
def scene():
    """An image and a depth map, and masks of a part of each."""
    generator = torch.Generator().manual_seed(11)
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator)
    depth = 3 * torch.rand(1, 1, HEIGHT, WIDTH, generator=generator) + 1
    hidden = torch.zeros(1, HEIGHT, WIDTH)
    hidden[:, 5:17, 11:30] = 1
    hidden[:, 3:5, 11:30] = 0.3  # a soft edge
    known = torch.rand(1, HEIGHT, WIDTH, generator=generator) < 0.1
    return SimpleNamespace(image=image, depth=depth, hidden=hidden, known=known)


def encode(loaded, keep="what is connected", strength="rigid", **inputs):
    """Of inputs as the library has them: (B, 3, H, W), (B, 1, H, W)."""
    from comfyui_nodes.latent_nodes import Encode

    for name in inputs.keys() & {"image", "depth"}:
        inputs[name] = inputs[name].movedim(1, -1).expand(-1, -1, -1, 3)
    return Encode.execute(loaded.model, keep, strength, False, 32, vae=loaded.vae, **inputs).result[0]


def sample(sampling, latent, depth_noise=None, **settings):
    """The latent, sampled, and the noise of image and depth that was used."""
    streams = latent["samples"].unbind()
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(x.shape, generator=generator) for x in streams]
    noise[1] = noise[1] if depth_noise is None else depth_noise
    result = sampling.ours(list(streams), noise=noise, **settings)
    return {**latent, "samples": sampling.comfy.nested_tensor.NestedTensor(result)}, noise


@torch.no_grad()
def decode(loaded, latent):
    from comfyui_nodes.latent_nodes import Decode

    image, depth, valid, geometry = Decode.execute(latent, loaded.vae).result
    assert torch.equal(geometry["depth"][geometry["mask"]], depth[..., 0][geometry["mask"]])
    return image.movedim(-1, 1), depth[..., :1].movedim(-1, 1), valid[:, None]


def library(sampling, noise, seed=9, **inputs):
    return sampling.pipeline(
        prompt="a red ball",
        num_inference_steps=6,
        latents=noise[0],
        depth_latents=noise[1],
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **inputs,
    )


def test_inpainting(loaded, sampling, scene):
    latent, noise = sample(sampling, encode(loaded, image=scene.image, image_mask=scene.hidden))
    image, depth, _ = decode(loaded, latent)
    output = library(sampling, noise, image=scene.image, mask_image=scene.hidden)
    assert max_error(image, output.images) <= 1e-4
    assert max_error(depth, output.depth) <= 1e-3
    assert torch.equal(image[:, :, scene.hidden[0] == 0], scene.image[:, :, scene.hidden[0] == 0])
    assert max_error(image, scene.image) > 0.1


@pytest.mark.parametrize(("strength", "log2_alpha"), [("rigid", None), ("soft", -8.0)])
def test_inpainting_under_fixed_geometry(loaded, sampling, scene, strength, log2_alpha):
    latent = encode(loaded, image=scene.image, image_mask=scene.hidden, depth=scene.depth, strength=strength)
    latent, noise = sample(sampling, latent)
    image, depth, valid = decode(loaded, latent)
    settings = {"image": scene.image, "mask_image": scene.hidden, "depth": scene.depth, "log2_alpha": log2_alpha}
    noise = noise if log2_alpha is not None else [noise[0], None]
    output = library(sampling, noise, **settings)
    assert max_error(image, output.images) <= 1e-4
    assert torch.equal(depth, scene.depth) and valid.all()


def test_outpainting(loaded, sampling, scene):
    """With the padded picture and the mask of the core's own node."""
    from nodes import ImagePadForOutpaint

    image, hidden = ImagePadForOutpaint().expand_image(
        scene.image[..., :24].movedim(1, -1), left=8, top=0, right=0, bottom=0, feathering=0
    )
    latent, noise = sample(sampling, encode(loaded, image=image.movedim(-1, 1), image_mask=hidden))
    made, _, _ = decode(loaded, latent)
    output = library(sampling, noise, image=image.movedim(-1, 1), mask_image=hidden)
    assert made.shape == (1, 3, HEIGHT, WIDTH) and max_error(made, output.images) <= 1e-4
    assert torch.equal(made[..., 8:], scene.image[..., :24])


def test_completion(loaded, sampling, scene):
    """Sparse depth of a whole image: in its unit, and as it is where it is known."""
    latent = encode(loaded, image=scene.image, depth=scene.depth, depth_mask=scene.known.float())
    latent, noise = sample(sampling, latent, cfg=1.0)
    image, depth, valid = decode(loaded, latent)
    output = library(sampling, [None, noise[1]], image=scene.image, depth=scene.depth, depth_mask=scene.known)
    assert close_depth(depth, output.depth, atol=1e-3)
    assert torch.equal(valid.bool(), output.depth_mask)
    assert torch.equal(depth[:, 0][scene.known], scene.depth[:, 0][scene.known])
    assert max_error(image, scene.image) > 0  # through the autoencoder


def test_both_in_part(loaded, sampling, scene):
    """The image first, with what is known of depth; then, in a second sampler, the rest of the depth of that image."""
    hidden = scene.hidden.round()
    known = 1 - hidden
    latent = encode(loaded, image=scene.image, image_mask=hidden, depth=scene.depth, depth_mask=known)
    latent, noise = sample(sampling, latent)
    latent = encode(loaded, keep="image", latent=latent)
    # The library draws the noise of its second pass when it comes to it.
    depth_noise = torch.randn(noise[1].shape, generator=torch.Generator().manual_seed(9))
    latent, _ = sample(sampling, latent, depth_noise, cfg=1.0)
    image, depth, _ = decode(loaded, latent)
    settings = {"mask_image": hidden, "depth": scene.depth, "depth_mask": known, "num_refinement_steps": 6}
    output = library(sampling, noise, image=scene.image, **settings)
    assert max_error(image, output.images) <= 1e-4
    assert close_depth(depth, output.depth, atol=1e-3)
    assert torch.equal(depth[:, 0][known == 1], scene.depth[:, 0][known == 1])


def test_what_is_left_to_make(loaded, scene):
    image, depth, sparse = scene.image, scene.depth, scene.depth * scene.known
    with pytest.raises(ValueError, match="nothing is left to make"):
        encode(loaded, image=image, depth=depth)
    with pytest.raises(ValueError, match="mask hides nothing"):
        encode(loaded, image=image, image_mask=torch.zeros_like(scene.hidden))
    with pytest.raises(ValueError, match="says which part to keep"):
        encode(loaded, keep="depth", image=image, depth=depth, image_mask=scene.hidden)
    with pytest.raises(ValueError, match=r"mask has shape \[1, 4, 4\]"):
        encode(loaded, image=image, image_mask=torch.ones(1, 4, 4))

    def made(**inputs):
        """Whether something of image and depth is made."""
        return [bool(levels.any()) for levels in encode(loaded, **inputs)["samples"].unbind()[2][0]]

    assert made(image=image) == made(image=image, depth=sparse) == [False, True]
    assert made(image=image, depth=depth, keep="image") == [False, True]
    assert made(depth=depth) == made(image=image, image_mask=scene.hidden, depth=depth) == [True, False]
    assert made(depth=sparse) == made(image=image, image_mask=scene.hidden, depth=sparse) == [True, True]
    assert len(encode(loaded, keep="nothing", image=image, depth=depth)["samples"].unbind()) == 2


def test_a_batch_is_its_singles(loaded, scene):
    images = torch.cat([scene.image, scene.image.flip(-1)])
    hidden = torch.cat([scene.hidden, scene.hidden.flip(-1)])
    batch = encode(loaded, image=images, image_mask=hidden)["samples"].unbind()
    for i in range(2):
        single = encode(loaded, image=images[i : i + 1], image_mask=hidden[i : i + 1])["samples"].unbind()
        for x, y in zip(batch, single):
            torch.testing.assert_close(x[i : i + 1], y)


# The core's latent nodes


def split(latent):
    from comfyui_nodes.latent_nodes import Split

    return Split.execute(latent).result


def join(image, depth):
    from comfyui_nodes.latent_nodes import Join

    return Join.execute(image, depth).result[0]


def test_apart_and_together_is_the_same(loaded, sampling, scene):
    latent = encode(loaded, image=scene.image, depth=scene.depth, keep="nothing")
    again = join(*split(latent))
    for x, y in zip(again["samples"].unbind(), latent["samples"].unbind()):
        assert torch.equal(x, y)
    for x, y in zip(decode(loaded, again), decode(loaded, latent)):
        assert torch.equal(x, y)


def test_a_larger_pass(loaded, sampling, scene):
    from nodes import LatentUpscaleBy

    latent, _ = sample(sampling, encode(loaded, image=scene.image, depth=scene.depth, keep="nothing"))
    image, depth = (LatentUpscaleBy().upscale(part, "bilinear", 1.5)[0] for part in split(latent))
    latent = join(image, depth)
    rows, columns = image["samples"].shape[-2:]
    size = TOKEN * rows, TOKEN * columns  # depth takes that of the image, where it was rounded
    assert [tuple(x.shape[-2:]) for x in latent["samples"].unbind()] == [(rows, columns), size]
    latent, _ = sample(sampling, latent, sigmas=sampling.sigmas(6)[3:])
    made, depth, valid = decode(loaded, latent)
    assert made.shape[-2:] == depth.shape[-2:] == valid.shape[-2:] and made.shape[-1] > 1.4 * WIDTH
    # Depth that is of another size takes that of the image; holes stay holes.
    image, depth = split(encode(loaded, image=scene.image, depth=scene.depth * scene.known, keep="nothing"))
    depths = join(LatentUpscaleBy().upscale(image, "bilinear", 1.5)[0], depth)["samples"].unbind()[1]
    assert tuple(depths.shape[-2:]) == size and set(depths.unique().tolist()) <= set(depth["samples"].unique().tolist())


def test_batches(loaded, sampling, scene):
    import comfy_extras.nodes_post_processing  # noqa: F401  (which `nodes_latent` imports in a circle)
    from comfy_extras.nodes_latent import LatentBatch
    from nodes import LatentFromBatch, RepeatLatentBatch

    def on_both(node, latent):
        return join(*(node(part) for part in split(latent)))

    first = encode(loaded, image=scene.image, depth=scene.depth, keep="nothing")
    second = encode(loaded, image=scene.image.flip(-1), depth=2 * scene.depth, keep="nothing")
    batch = join(*(LatentBatch.execute(*parts).result[0] for parts in zip(split(first), split(second))))
    repeated = on_both(lambda part: RepeatLatentBatch().repeat(part, 3)[0], batch)
    assert [len(x) for x in repeated["samples"].unbind()] == [6, 6]
    one = on_both(lambda part: LatentFromBatch().frombatch(part, 1, 1)[0], batch)
    for x, y in zip(one["samples"].unbind(), second["samples"].unbind()):
        torch.testing.assert_close(x, y)
    latent, _ = sample(sampling, one)
    assert decode(loaded, latent)[0].shape == (1, 3, HEIGHT, WIDTH)


def test_frames_of_a_video_with_one_noise(comfy, loaded, scene):
    import comfy_extras.nodes_post_processing  # noqa: F401  (as above)
    from comfy_extras.nodes_latent import LatentBatchSeedBehavior

    latent = encode(loaded, image=torch.cat([scene.image, scene.image.flip(-1)]))
    latent = LatentBatchSeedBehavior.execute(latent, "fixed").result[0]
    noise = comfy.sample.prepare_noise(latent["samples"], 3, latent["batch_index"]).unbind()
    assert all(torch.equal(x[0], x[1]) for x in noise)


def test_masks_of_the_parts(loaded, sampling, scene):
    """'Set Latent Noise Mask' on either: its part is kept where the mask is 0."""
    from nodes import SetLatentNoiseMask

    image, depth = split(encode(loaded, image=scene.image, depth=scene.depth, keep="nothing"))
    mask = torch.ones(1, HEIGHT, WIDTH)
    mask[..., :16] = 0
    image = SetLatentNoiseMask().set_mask(image, mask)[0]
    joined = join(image, SetLatentNoiseMask().set_mask(depth, torch.zeros_like(mask))[0])
    made = sample(sampling, joined, mask=joined["noise_mask"].unbind())[0]["samples"].unbind()
    assert torch.equal(made[1], depth["samples"])
    torch.testing.assert_close(made[0][..., :4], image["samples"][..., :4])
    assert max_error(made[0][..., 5:], image["samples"][..., 5:]) > 0.1


def test_parts_that_do_not_go_together(loaded, scene):
    image, depth = split(encode(loaded, image=scene.image))
    with pytest.raises(ValueError, match="no parts of an RGB-D latent"):
        join(depth, image)
    three = {**image, "samples": image["samples"].expand(3, -1, -1, -1)}
    two = {**depth, "samples": depth["samples"].expand(2, -1, -1, -1)}
    with pytest.raises(ValueError, match="3 images do not go with 2 depth maps"):
        join(three, two)


@pytest.mark.parametrize("name", ["upscale", "repeat", "flip"])
def test_a_core_node_that_takes_one_tensor_names_the_remedy(loaded, scene, name):
    from nodes import LatentFlip, LatentUpscaleBy, RepeatLatentBatch

    call = {
        "upscale": lambda x: LatentUpscaleBy().upscale(x, "bilinear", 2.0),
        "repeat": lambda x: RepeatLatentBatch().repeat(x, 2),
        "flip": lambda x: LatentFlip().flip(x, "x-axis: vertically"),
    }[name]
    with pytest.raises((AttributeError, TypeError), match="take it apart by 'Split RGB-D Latent'"):
        call(encode(loaded, image=scene.image))


# Regions


@torch.no_grad()
def test_a_prompt_counts_in_its_region(sampling, comfy):
    """Of two prompts with a half of the picture each, in one step from noise: each stream's halves are the prompts'."""
    left = torch.zeros(1, HEIGHT, WIDTH)
    left[..., : WIDTH // 2] = 1
    settings = {"cfg": 1.0, "sigmas": torch.tensor([0.8, 0.0]), "log2_alpha": 0.0}
    texts = ("a red ball", "a blue box on grass")
    alone = []
    for text in texts:
        alone.append(sampling.ours(**settings, positive=sampling.conds(text)))
    area = (HEIGHT // 8, WIDTH // 16, 0, WIDTH // 16)
    regions = {
        "mask": [{"mask": left, "mask_strength": 1.0}, {"mask": 1 - left, "mask_strength": 1.0}],
        "area": [{"mask": left, "mask_strength": 1.0}, {"area": area, "strength": 1.0}],
        "share": [{"mask": left, "mask_strength": 1.0}, {"area": ("percentage", 1.0, 0.5, 0.0, 0.5), "strength": 1.0}],
    }
    for name, (one, other) in regions.items():
        ours = sampling.ours(**settings, positive=sampling.conds(texts[0], **one) + sampling.conds(texts[1], **other))
        for x, first, second in zip(ours, *alone):
            half = x.shape[-1] // 2
            torch.testing.assert_close(x[..., :half], first[..., :half], rtol=1e-4, atol=1e-4, msg=name)
            torch.testing.assert_close(x[..., half:], second[..., half:], rtol=1e-4, atol=1e-4, msg=name)
            assert max_error(first, second) > 1e-3
