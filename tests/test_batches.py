"""Any batch is what its inputs make one by one: nothing of one input reaches another."""

import numpy as np
import PIL.Image
import pytest
import torch


RNG = np.random.default_rng(0)
# Of other ranges each, with hard edges: where a range is shared, the ringing of one is cut to that of another.
IMAGES = (np.array([40, 90, 140])[:, None, None, None] + 80 * (RNG.random((3, 40, 72, 3)) > 0.5)).astype(np.uint8)
DEPTHS = (np.array([1, 50, 3000])[:, None, None] * (1 + RNG.random((3, 40, 72)))).astype(np.float32)
for number in range(3):
    DEPTHS[number, : 10 + 5 * number, :30] = 0
HIDDEN = np.zeros((3, 40, 72), dtype=np.uint8)
for number in range(3):
    HIDDEN[number, 8:, 20 + 10 * number :] = 255

IMAGE_KINDS = {
    "PIL": [PIL.Image.fromarray(image) for image in IMAGES],
    "arrays": list(IMAGES),
    "array of bytes": IMAGES,
    "array of floats": IMAGES / 255,
    "tensor of bytes": torch.from_numpy(IMAGES).movedim(-1, 1),
    "tensor of floats": torch.from_numpy(IMAGES).movedim(-1, 1) / 255,
    "mixed list": [PIL.Image.fromarray(IMAGES[0]), IMAGES[1] / 255, torch.from_numpy(IMAGES[2]).movedim(-1, 0)],
}
DEPTH_KINDS = {
    "PIL": [PIL.Image.fromarray(depth) for depth in DEPTHS],
    "arrays": list(DEPTHS),
    "array": DEPTHS,
    "array with channel": DEPTHS[..., None],
    "tensor": torch.from_numpy(DEPTHS),
    "tensor with channel": torch.from_numpy(DEPTHS)[:, None],
    "mixed list": [DEPTHS[0], torch.from_numpy(DEPTHS[1]), PIL.Image.fromarray(DEPTHS[2])],
}


def made(pipe, seeds, prompts, **inputs):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, num_inference_steps=2, output_type="np", **inputs)


def check(pipe, inputs, one_by_one, **settings):
    """`inputs` of a batch of three, and the same of each result."""
    prompts = ["a cat", "a dog", "a house"]
    settings = {"height": 24, "width": 40} | settings
    batch = made(pipe, range(3), prompts, **inputs, **settings)
    for number, alone in enumerate(one_by_one):
        single = made(pipe, [number], prompts[number], **alone, **settings)
        for name in ("images", "depth", "depth_mask", "depth_uncertainty"):
            together, apart = getattr(batch, name), getattr(single, name)
            assert (together is None) == (apart is None)
            if together is not None:
                close = np.isclose(together[number], apart[0], rtol=1e-3, atol=1e-4)
                assert close.mean() > 0.999, (name, number)  # a pixel may lie on the border of what is valid


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_depth_of_images(pipe, kind):
    check(pipe, {"image": IMAGE_KINDS[kind]}, [{"image": image} for image in IMAGE_KINDS[kind]])


@pytest.mark.parametrize("kind", DEPTH_KINDS)
@pytest.mark.parametrize("log2_alpha", [None, -5.0])
def test_images_of_depth(pipe, kind, log2_alpha):
    maps = DEPTH_KINDS[kind]
    check(pipe, {"depth": maps}, [{"depth": depth} for depth in maps], log2_alpha=log2_alpha)


def test_images_and_depth_of_text(pipe):
    check(pipe, {}, [{}, {}, {}], num_refinement_steps=1, ensemble_size=2)


def test_ensembles(pipe):
    check(pipe, {"image": IMAGES}, [{"image": image} for image in IMAGES], ensemble_size=3)


@pytest.mark.parametrize("kind", ["PIL", "array of bytes", "tensor of floats"])
def test_images_that_are_hidden_in_part(pipe, kind):
    images = IMAGE_KINDS[kind]
    singles = [{"image": image, "mask_image": hidden} for image, hidden in zip(images, HIDDEN)]
    check(pipe, {"image": images, "mask_image": HIDDEN}, singles)


@pytest.mark.parametrize("kind", ["PIL", "array", "tensor with channel"])
def test_depth_that_is_known_in_part(pipe, kind):
    maps = DEPTH_KINDS[kind]
    singles = [
        {"image": image, "depth": depth, "depth_mask": hidden == 0}
        for image, depth, hidden in zip(IMAGES, maps, HIDDEN)
    ]
    check(pipe, {"image": IMAGES, "depth": maps, "depth_mask": HIDDEN == 0}, singles)
