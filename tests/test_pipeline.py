import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.callbacks import PipelineCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import close_depth, make_pipeline

from mf_diffusers import DepthProcessor, ModalityForcingPipeline
from mf_diffusers.modality_forcing.noise import shift_timestep
from mf_diffusers.modality_forcing.pipeline import token_positions
from mf_diffusers.modality_forcing.stream import Stream


KITTI = Path(__file__).parents[2] / "shared" / "data" / "rgbd" / "kitti_color.png"
IMAGE = np.random.default_rng(0).random((40, 72, 3), dtype=np.float32)
DEPTH = 1 + np.random.default_rng(1).random((40, 72), dtype=np.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(pipe, *args, seed=0, num_inference_steps=2, output_type="np", **kwargs):
    return pipe(
        *args, generator=seeded(seed), num_inference_steps=num_inference_steps, output_type=output_type, **kwargs
    )


# The three tasks


def test_text_to_image_and_depth(pipe):
    output = call(pipe, ["a cat", "a dog"], height=24, width=40)
    assert output.images.shape == (2, 24, 40, 3) and output.images.min() >= 0 and output.images.max() <= 1
    assert output.depth.shape == output.depth_mask.shape == (2, 24, 40)
    assert output.depth.dtype == np.float32 and output.depth_mask.dtype == bool
    assert np.isfinite(output.depth).all() and (output.depth > 0).all()
    assert output.depth_uncertainty is None


def test_image_to_depth(pipe):
    output = call(pipe, image=np.stack([IMAGE, 1 - IMAGE]))
    assert output.images is None
    assert output.depth.shape == (2, 40, 72)
    assert not np.array_equal(call(pipe, "a prompt", image=np.stack([IMAGE, 1 - IMAGE])).depth, output.depth)


def test_depth_to_image(pipe):
    output = call(pipe, "a cat", depth=np.stack([DEPTH, DEPTH[::-1]]))
    assert output.images.shape == (2, 40, 72, 3)
    assert output.depth is None


@pytest.mark.skipif(not KITTI.is_file(), reason="the street frame is not on this machine")
def test_image_to_depth_has_the_size_of_the_image():
    output = call(make_pipeline(), image=PIL.Image.open(KITTI))
    assert output.depth.shape == (1, 375, 1242)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (33, 47), (200, 16)])
def test_any_size_and_aspect_ratio(pipe, size):
    assert call(pipe, image=np.ones((*size, 3), np.float32)).depth.shape == (1, *size)
    assert call(pipe, "x", depth=np.ones(size, np.float32)).images.shape == (1, *size, 3)


def test_depth_scale_does_not_matter(pipe):
    image = call(pipe, "a cat", depth=DEPTH).images
    assert np.allclose(image, call(pipe, "a cat", depth=1000 * DEPTH).images, atol=1e-4)
    millimetres = (1000 * DEPTH).round().astype(np.uint16)
    assert np.allclose(image, call(pipe, "a cat", depth=PIL.Image.fromarray(millimetres)).images, atol=5e-2)


def test_missing_depth_is_the_mask(pipe):
    holes = np.zeros(DEPTH.shape, bool)
    holes[10:20, 10:30] = True
    images = [
        call(pipe, "a cat", depth=np.where(holes, missing, DEPTH)).images
        for missing in (0, -1, np.nan, np.inf, -np.inf)
    ]
    images.append(call(pipe, "a cat", depth=DEPTH, depth_mask=~holes).images)
    assert all(np.array_equal(images[0], image) for image in images[1:])
    assert not np.array_equal(images[0], call(pipe, "a cat", depth=DEPTH).images)
    pairs = {"depth": np.stack([DEPTH, DEPTH]), "depth_mask": np.stack([~holes, ~holes[::-1]])}
    both = call(pipe, "a cat", num_images_per_prompt=2, **pairs)
    assert both.images.shape == (4, 40, 72, 3)


# Options


def test_steps_guidance_and_sigmas(pipe):
    one, four = call(pipe, "a cat", num_inference_steps=1), call(pipe, "a cat", num_inference_steps=4)
    assert not np.array_equal(one.images, four.images)
    even = call(pipe, "a cat", sigmas=[1.0, 0.75, 0.5, 0.25])
    assert np.allclose(even.images, four.images, atol=1e-5) and close_depth(even.depth, four.depth)
    assert np.array_equal(call(pipe, "a cat").images, call(pipe, "a cat", guidance_scale=4.0).images)
    assert not np.array_equal(call(pipe, "a cat").images, call(pipe, "a cat", guidance_scale=1.0).images)
    assert np.array_equal(call(pipe, image=IMAGE).depth, call(pipe, image=IMAGE, guidance_scale=1.0).depth)
    assert not np.array_equal(
        call(pipe, "x", image=IMAGE).depth, call(pipe, "x", image=IMAGE, guidance_scale=3.0).depth
    )
    # Against the empty prompt, so an empty prompt is not guided anywhere.
    empty = call(pipe, "", guidance_scale=4.0), call(pipe, "", guidance_scale=1.0)
    assert np.allclose(empty[0].images, empty[1].images, atol=1e-4)


@pytest.mark.parametrize("log2_alpha", [-5.0, 0.0, 5.0])
def test_trajectory(pipe, log2_alpha):
    levels = []
    forward = pipe.transformer.forward

    def record(*args, **kwargs):
        levels.append((kwargs["timestep"][0].item(), kwargs["depth_timestep"][0].item()))
        return forward(*args, **kwargs)

    pipe.transformer.forward = record
    call(pipe, "a cat", log2_alpha=log2_alpha, guidance_scale=1.0, num_inference_steps=5)
    assert len(levels) == 5 and levels[0] == (1.0, 1.0)
    for t, depth_t in levels:
        assert depth_t == pytest.approx(shift_timestep(torch.tensor(t), 2.0**log2_alpha).item(), abs=1e-6)


def test_default_trajectory_is_rgb_first(pipe):
    default, explicit = call(pipe, "a cat"), call(pipe, "a cat", log2_alpha=5.0)
    assert np.array_equal(default.depth, explicit.depth)
    assert not np.array_equal(default.depth, call(pipe, "a cat", log2_alpha=0.0).depth)


def test_depth_conditioning_runs_from_loose_to_rigid(pipe):
    rigid = call(pipe, "a cat", depth=DEPTH, num_inference_steps=4).images
    distances = [
        np.abs(call(pipe, "a cat", depth=DEPTH, num_inference_steps=4, log2_alpha=a).images - rigid).mean()
        for a in (0, -5, -8, -11, -14, -30)
    ]
    assert distances[0] > distances[2] > distances[4] > distances[5]
    assert distances[5] < 1e-3


def test_refinement_is_image_to_depth_of_the_result(pipe):
    plain = call(pipe, "a cat")
    refined = call(pipe, "a cat", num_refinement_steps=3)
    assert np.array_equal(plain.images, refined.images)
    assert not np.array_equal(plain.depth, refined.depth)
    # The same as image -> depth from the generated latents and the noise that was next.
    generator = seeded()
    for shape in ((1, 16, 8, 8), (1, 1, 32, 32)):
        torch.randn(shape, generator=generator)
    noise = pipe.depth_processor.patchify(torch.randn(1, 1, 32, 32, generator=generator))
    tokens = []
    call(pipe, "a cat", callback_on_step_end=lambda p, i, t, tensors: tokens.append(tensors["latents"]))
    depth = pipe.prepare_depth_of_image(None, noise, 32, 32, [1, 2 / 3, 1 / 3])
    streams = {"image": Stream.given(tokens[-1], depth.levels), "depth": depth}
    with torch.no_grad():
        pipe.denoise(streams, token_positions(8, 8, "cpu"), pipe.encode_prompt("a cat")[0])
    expected, _ = pipe.depth_processor.postprocess(depth.tokens, 32, 32)
    assert close_depth(refined.depth[0], expected[0, 0], atol=1e-4)


def test_holes_in_loose_depth_are_unit_noise_at_every_level(pipe):
    holes = np.zeros(DEPTH.shape, bool)
    holes[:, :36] = True
    stds = []
    forward = pipe.transformer.forward

    def record(*args, **kwargs):
        noisy = pipe.depth_processor.unpatchify(kwargs["depth_hidden_states"], 24, 44)
        stds.append(noisy[..., :20].std().item())
        return forward(*args, **kwargs)

    pipe.transformer.forward = record
    call(pipe, "a cat", depth=np.where(holes, 0, DEPTH), log2_alpha=0.0, num_inference_steps=6, guidance_scale=1.0)
    del stds[6:]  # of the pass that makes the rest of the depth
    assert max(stds) - min(stds) < 1e-6 and 0.9 < stds[0] < 1.1


def test_ensemble(pipe):
    output = call(pipe, image=IMAGE, ensemble_size=5)
    assert output.depth.shape == output.depth_uncertainty.shape == (1, 40, 72)
    assert (output.depth_uncertainty >= 0).all() and output.depth_uncertainty.max() > 0
    refined = call(pipe, "a cat", num_refinement_steps=1, ensemble_size=3)
    assert refined.depth_uncertainty.shape == refined.depth.shape


def test_several_images_per_prompt(pipe):
    output = call(pipe, ["a cat", "a dog"], num_images_per_prompt=2)
    assert output.images.shape[0] == output.depth.shape[0] == 4
    assert not np.array_equal(output.images[0], output.images[1])
    assert call(pipe, image=IMAGE, num_images_per_prompt=3).depth.shape[0] == 3
    assert call(pipe, ["a", "b"], depth=DEPTH, num_images_per_prompt=2).images.shape[0] == 4
    assert call(pipe, ["a", "b"], image=IMAGE).depth.shape[0] == 2


def test_a_generator_for_each_result(pipe):
    both = pipe(
        ["a cat", "a dog"],
        generator=[seeded(1), seeded(2)],
        num_inference_steps=2,
        output_type="np",
        height=24,
        width=24,
    )
    for i, prompt in enumerate(["a cat", "a dog"]):
        one = call(pipe, prompt, seed=i + 1, height=24, width=24)
        assert np.allclose(one.images[0], both.images[i], atol=1e-4)
        assert close_depth(one.depth[0], both.depth[i], atol=1e-4)


def test_same_seed_same_result(pipe):
    assert np.array_equal(call(pipe, "a cat").images, call(pipe, "a cat").images)
    assert not np.array_equal(call(pipe, "a cat").images, call(pipe, "a cat", seed=1).images)


@pytest.fixture
def stochastic_pipe():
    pipe = make_pipeline()
    for name in ("scheduler", "depth_scheduler"):
        config = getattr(pipe, name).config
        setattr(pipe, name, FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True))
    return pipe


@pytest.mark.parametrize("inputs", [{"height": 24, "width": 24}, {"image": IMAGE}, {"depth": DEPTH, "log2_alpha": -5}])
def test_stochastic_sampling_is_seeded(stochastic_pipe, inputs):
    def results(prompts, seeds, steps=3):
        torch.manual_seed(len(prompts))  # the global generator plays no part
        output = stochastic_pipe(
            prompts, generator=[*map(seeded, seeds)], num_inference_steps=steps, output_type="np", **inputs
        )
        return [part for part in (output.images, output.depth) if part is not None]

    both = results(["a cat", "a dog"], [1, 2])
    for i, prompt in enumerate(["a cat", "a dog"]):
        for one, of_both in zip(results([prompt], [i + 1]), both):
            assert np.allclose(one[0], of_both[i], rtol=1e-3, atol=1e-4)


def test_stochastic_sampling_adds_noise_in_every_step_but_the_last(pipe, stochastic_pipe):
    for steps, is_same in (1, True), (2, False):
        images = [call(p, "a cat", num_inference_steps=steps).images for p in (pipe, stochastic_pipe)]
        assert np.allclose(*images, atol=1e-5) == is_same


def test_prompt_embeds(pipe):
    prompt_embeds, text_ids = pipe.encode_prompt(["a cat", "a dog"])
    assert prompt_embeds.shape == (2, 64, 48) and text_ids.shape == (1, 64, 4)
    expected = call(pipe, ["a cat", "a dog"])
    negative_prompt_embeds, _ = pipe.encode_prompt("")
    pipe.text_encoder = pipe.tokenizer = None
    output = call(pipe, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)
    assert np.array_equal(output.images, expected.images) and np.array_equal(output.depth, expected.depth)


def test_prompts_are_encoded_as_klein_encodes_them(pipe):
    expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        pipe.text_encoder, pipe.tokenizer, ["a cat", ""], max_sequence_length=64, hidden_states_layers=[1, 2, 3]
    )
    assert torch.allclose(pipe.encode_prompt(["a cat", ""])[0], expected, atol=1e-6)


def test_given_latents(pipe):
    latents = torch.randn(1, 16, 8, 8, generator=seeded())
    depth_latents = torch.randn(1, 1, 32, 32, generator=seeded(1))
    a = call(pipe, "a cat", seed=0, latents=latents, depth_latents=depth_latents)
    b = call(pipe, "a cat", seed=9, latents=latents, depth_latents=depth_latents)
    assert np.array_equal(a.images, b.images) and np.array_equal(a.depth, b.depth)


def test_callback(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep.item(), set(tensors)))
        return {"depth_latents": torch.zeros_like(tensors["depth_latents"])}

    output = call(pipe, "a cat", output_type="latent", callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1] and seen[0][1] == 1000.0
    assert all(names == {"latents", "depth_latents"} for _, _, names in seen)
    assert not output.depth.any()


def test_interrupt(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True

    stopped = call(pipe, "a cat", num_inference_steps=4, callback_on_step_end=stop)
    assert not np.array_equal(stopped.images, call(pipe, "a cat", num_inference_steps=4).images)
    # What is there already is kept: neither refinement nor further samples turn it into noise.
    refined = call(pipe, "a cat", num_inference_steps=4, num_refinement_steps=3, callback_on_step_end=stop)
    assert np.array_equal(refined.images, stopped.images) and np.array_equal(refined.depth, stopped.depth)
    one = call(pipe, image=IMAGE, callback_on_step_end=stop)
    assert np.array_equal(call(pipe, image=IMAGE, ensemble_size=4, callback_on_step_end=stop).depth, one.depth)


def test_guidance_can_be_switched_off_on_the_way(pipe):
    def cutoff(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0

    assert not np.array_equal(call(pipe, "a cat", callback_on_step_end=cutoff).images, call(pipe, "a cat").images)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    call(pipe, "a cat", num_inference_steps=4, callback_on_step_end=cutoff)
    assert len(calls) == 2 + 3


def test_diffusers_callbacks(pipe):
    class Zero(PipelineCallback):
        tensor_inputs = ["depth_latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"depth_latents": torch.zeros_like(callback_kwargs["depth_latents"])}

    assert not call(
        pipe, "a cat", output_type="latent", callback_on_step_end=Zero(cutoff_step_ratio=None, cutoff_step_index=0)
    ).depth.any()


def test_progress_bar_counts_every_pass(pipe, capfd):
    pipe.set_progress_bar_config(disable=False, file=sys.stderr)
    call(pipe, "a cat", num_inference_steps=3, num_refinement_steps=2, ensemble_size=2)
    assert "7/7" in capfd.readouterr().err


def test_output_types(pipe):
    arrays, tensors, pictures, latent = (
        call(pipe, "a cat", output_type=kind) for kind in ("np", "pt", "pil", "latent")
    )
    assert tensors.images.shape == (1, 3, 32, 32) and tensors.depth.shape == tensors.depth_mask.shape == (1, 1, 32, 32)
    assert np.array_equal(tensors.depth[:, 0].numpy(), arrays.depth)
    assert np.abs(np.asarray(pictures.images[0]) / 255 - arrays.images[0]).max() < 0.01
    assert np.array_equal(pictures.depth, arrays.depth)
    decoded = pipe.vae.decode(latent.images).sample.clamp(-1, 1)
    assert torch.allclose(decoded / 2 + 0.5, tensors.images, atol=1e-5)
    assert latent.depth.shape == (1, 1, 32, 32)
    images, depth, _, uncertainty = call(pipe, "a cat", return_dict=False)
    assert np.array_equal(images, arrays.images) and np.array_equal(depth, arrays.depth) and uncertainty is None


def test_inputs_of_every_kind(pipe):
    picture = PIL.Image.fromarray((255 * IMAGE).round().astype(np.uint8))
    expected = call(pipe, image=picture).depth
    for image in (
        [picture],
        np.asarray(picture),
        np.asarray(picture)[None] / 255,
        torch.tensor(np.asarray(picture) / 255).movedim(-1, 0),
    ):
        assert close_depth(call(pipe, image=image).depth, expected, atol=1e-4)
    expected = call(pipe, "x", depth=DEPTH).images
    for depth in (
        torch.tensor(DEPTH),
        torch.tensor(DEPTH)[None, None],
        DEPTH[None, ..., None],
        [DEPTH],
        PIL.Image.fromarray(DEPTH),
    ):
        assert np.array_equal(call(pipe, "x", depth=depth).images, expected)


# Repairs, each of them documented


def test_sizes_that_are_no_multiple_of_a_token_are_rounded(pipe, monkeypatch):
    messages = []
    monkeypatch.setattr("mf_diffusers.modality_forcing.pipeline.logger.warning", messages.append)
    assert call(pipe, "a cat", height=30, width=33).images.shape == (1, 30, 33, 3)
    assert messages == ["30x33 is not a multiple of 4: working at 32x32."]
    assert call(pipe, image=IMAGE, height=20).depth.shape == (1, 40, 72)
    assert len(messages) == 1


def test_prompt_embeds_of_another_length(pipe):
    short = torch.randn(1, 7, 48, generator=seeded())
    assert call(pipe, prompt_embeds=short).images.shape == (1, 32, 32, 3)


def test_casting_the_pipeline_keeps_the_depth_head(pipe):
    head = pipe.transformer.depth_head.proj_out.weight.clone()
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.equal(pipe.transformer.depth_head.proj_out.weight, head)
    assert call(pipe, "a cat").depth.dtype == np.float32


def test_float16_is_refused(pipe):
    pipe.transformer.to(torch.float16)
    with pytest.raises(ValueError, match="overflows in float16"):
        call(pipe, "a cat")


def test_components_that_do_not_fit(pipe):
    klein_scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="static shift"):
        call(ModalityForcingPipeline(**pipe.components | {"scheduler": klein_scheduler}), "a cat")
    with pytest.raises(ValueError, match="patches are 8 pixels wide, the VAE's tokens 4"):
        call(ModalityForcingPipeline(**pipe.components | {"depth_processor": DepthProcessor(patch_size=8)}), "a cat")
    with pytest.raises(ValueError, match="guidance-distilled"):
        call(make_pipeline(guidance_embeds=True), "a cat")


def test_long_prompts_are_cut(pipe):
    with pytest.MonkeyPatch.context() as patch:
        messages = []
        patch.setattr("mf_diffusers.modality_forcing.text_features.logger.warning", messages.append)
        a = call(pipe, "word " * 100)
        b = call(pipe, "word " * 100 + "and more")
    assert np.array_equal(a.images, b.images)
    assert "the text encoder takes 64" in messages[0]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give a `prompt`"),
        ({"prompt": 3}, "string or a list of strings"),
        ({"prompt": []}, "string or a list of strings"),
        ({"prompt": "x", "prompt_embeds": torch.zeros(1, 64, 48)}, "not both"),
        ({"prompt": "x", "image": IMAGE, "depth": DEPTH}, "nothing is left to make"),
        ({"prompt": "x", "num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, got 0"),
        ({"prompt": "x", "num_inference_steps": -5}, "got -5"),
        ({"prompt": "x", "num_refinement_steps": -1}, "at least 0, got -1"),
        ({"prompt": "x", "num_images_per_prompt": 0}, "at least 1, got 0"),
        ({"image": IMAGE, "ensemble_size": 0}, "at least 1, got 0"),
        ({"image": IMAGE, "num_refinement_steps": 2}, "leave it out"),
        ({"prompt": "x", "ensemble_size": 3}, "`ensemble_size` needs depth made from an image"),
        ({"image": IMAGE, "ensemble_size": 3, "output_type": "latent"}, "'pt' in place of 'latent'"),
        ({"image": IMAGE, "ensemble_size": 3, "depth_latents": torch.zeros(1)}, "cannot start an ensemble"),
        ({"image": IMAGE, "log2_alpha": 5.0}, "leave it out"),
        ({"image": IMAGE, "latents": torch.zeros(1)}, "leave it out"),
        ({"prompt": "x", "depth": DEPTH, "depth_latents": torch.zeros(1)}, "leave it out"),
        ({"prompt": "x", "depth_mask": DEPTH}, "give both"),
        ({"prompt": "x", "depth": DEPTH, "depth_mask": DEPTH[1:]}, "mask has shape"),
        ({"prompt": "x", "output_type": "jpg"}, "'pil', 'np', 'pt' or 'latent', got 'jpg'"),
        ({"prompt": "x", "callback_on_step_end_tensor_inputs": ["noise"]}, "known are"),
        ({"prompt": ["x", "y"], "image": np.stack([IMAGE] * 3)}, "do not go together: 2 prompts, 3 images"),
        ({"prompt": "x", "generator": [seeded(), seeded()]}, "2 generators do not go with 1 results"),
        ({"prompt": "x", "height": -16}, "`height` must be an integer of at least 1, got -16"),
        ({"image": IMAGE, "width": 0}, "`width` must be an integer of at least 1, got 0"),
        ({"prompt": "x", "height": "32"}, "got '32'"),
        ({"prompt": "x", "num_inference_steps": True}, "got True"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "`guidance_scale` must be a number from 0"),
        ({"prompt": "x", "guidance_scale": "4"}, "got '4'"),
        ({"prompt": "x", "log2_alpha": -55}, "`log2_alpha` must be a number from -30 to 30, got -55"),
        ({"prompt": "x", "sigmas": []}, "must fall from at most 1 to above 0"),
        ({"prompt": "x", "sigmas": [0.5, 0.9]}, "must fall"),
        ({"prompt": "x", "sigmas": [float("nan")]}, "must fall"),
        ({"prompt": "x", "generator": 0}, "torch.Generator or a list of them, got 0"),
        ({"prompt_embeds": torch.zeros(1, 64, 40)}, r"shape \(B, L, 48\), got \(1, 64, 40\)"),
        ({"prompt_embeds": [1.0]}, r"shape \(B, L, 48\), got <class 'list'>"),
        (
            {"prompt_embeds": torch.zeros(3, 64, 48), "negative_prompt_embeds": torch.zeros(2, 64, 48)},
            "do not go with 3",
        ),
        (
            {"prompt": "x", "latents": torch.full((1, 16, 8, 8), torch.nan)},
            "`latents` must be a tensor of finite values",
        ),
        ({"prompt": "x", "latents": np.zeros((1, 16, 8, 8))}, "`latents` must be a tensor"),
        ({"image": np.ones((1, 5000, 3), np.float32)}, "too long and thin"),
        ({"image": IMAGE[..., 0]}, "unsigned integers"),
        ({"image": np.full((4, 4, 3), "x")}, "unsigned integers"),
        ({"image": []}, "holds no image"),
        ({"image": 2 * IMAGE - 1}, "or map"),
        ({"prompt": "x", "depth": IMAGE}, "must have shape"),
        ({"prompt": "x", "depth": DEPTH, "depth_mask": "mask.png"}, "A depth mask must be"),
        ({"prompt": "x", "latents": torch.zeros(1, 3, 8, 8)}, r"must have shape \(1, 16, 8, 8\)"),
        ({"image": IMAGE[..., :2]}, "3 channels"),
        ({"image": IMAGE[:0]}, "at least one pixel"),
        ({"image": 255 * IMAGE}, "divide 8-bit values by 255"),
        ({"image": np.full_like(IMAGE, np.nan)}, r"must lie in \[0, 1\]"),
        ({"image": "picture.png"}, "got <class 'str'>"),
        ({"image": [IMAGE, IMAGE[1:]]}, "share one size"),
        ({"image": PIL.Image.fromarray(DEPTH)}, "floats has no known range"),
        ({"prompt": "x", "depth": DEPTH[:0]}, "a pixel"),
        ({"prompt": "x", "depth": DEPTH[None, None, None]}, "must have shape"),
        ({"prompt": "x", "depth": IMAGE[None]}, "must have shape"),
        ({"prompt": "x", "depth": np.zeros_like(DEPTH)}, "has no valid pixel"),
        (
            {"prompt": "x", "depth": np.stack([DEPTH, np.full_like(DEPTH, np.nan)])},
            "Depth map 1 of the batch has no valid",
        ),
        ({"prompt": "x", "depth": PIL.Image.fromarray((255 * IMAGE).astype(np.uint8))}, "carries no depth values"),
        ({"prompt": "x", "depth": [DEPTH, DEPTH[1:]]}, "share one size"),
        ({"prompt": "x", "depth": "depth.png"}, "got <class 'str'>"),
    ],
)
def test_bad_input(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"num_inference_steps": 1} | arguments)


def test_eight_bit_depth_warns(pipe):
    with pytest.MonkeyPatch.context() as patch:
        messages = []
        patch.setattr("mf_diffusers.modality_forcing.depth_processor.logger.warning", messages.append)
        call(pipe, "x", depth=PIL.Image.fromarray((100 * DEPTH).astype(np.uint8)))
    assert "256 levels" in messages[0]


def test_depth_with_a_background_warns(pipe):
    depth = np.stack([DEPTH, np.where(DEPTH > 1.9, np.float32(1e10), DEPTH)])
    with pytest.warns(UserWarning, match=r"Depth map 1 of the batch: \d+ pixels hold 1e\+10, .* by `depth_mask`"):
        call(pipe, ["x", "x"], depth=depth)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipe, ["x", "x"], depth=depth, depth_mask=depth < 1e10)
        call(pipe, ["x", "x"], depth=np.where(depth > 2, np.inf, depth))


# Loading


def test_save_and_load_in_a_fresh_process(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    expected = call(pipe, "a cat", output_type="pt")
    script = f"""
import torch, mf_diffusers
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "model")!r})
assert type(pipe) is mf_diffusers.ModalityForcingPipeline and pipe.depth_processor.config.patch_size == 4
output = pipe("a cat", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt")
save_file({{"images": output.images, "depth": output.depth}}, {str(tmp_path / "out.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"HF_HUB_OFFLINE": "1", "PATH": ""}, timeout=300)
    loaded = load_file(tmp_path / "out.safetensors")
    # not to the bit: the number of threads may differ, and with it the order of sums
    assert torch.allclose(loaded["images"], expected.images, atol=1e-5)
    assert close_depth(loaded["depth"], expected.depth)


def make_flux2(pipe) -> Flux2Transformer2DModel:
    """A FLUX.2 transformer of the size of the pipeline's."""
    config = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_") and "depth" not in k}
    return Flux2Transformer2DModel(**config)


def test_graft_onto_klein(pipe):
    klein = Flux2KleinPipeline(pipe.scheduler, pipe.vae, pipe.text_encoder, pipe.tokenizer, make_flux2(pipe))
    grafted = ModalityForcingPipeline.from_base(
        klein, text_encoder_out_layers=[1, 2, 3], max_sequence_length=64, default_sample_size=32
    )
    grafted.set_progress_bar_config(disable=True)
    assert grafted.depth_processor.config.patch_size == 4
    assert len(grafted.transformer.depth_decoder_blocks) == 4
    output = call(grafted, "a cat")
    assert output.images.shape == (1, 32, 32, 3) and output.depth.shape == (1, 32, 32)


def test_lora_saved_for_flux2_loads_changes_and_unloads(pipe, tmp_path):
    flux = make_flux2(pipe)
    flux.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_qkv_mlp_proj"], init_lora_weights=False))
    Flux2KleinPipeline.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(flux))
    before = call(pipe, "a cat")
    pipe.load_lora_weights(tmp_path)
    changed = call(pipe, "a cat")
    assert not np.array_equal(before.images, changed.images) and not np.array_equal(before.depth, changed.depth)
    assert np.allclose(call(pipe, "a cat", attention_kwargs={"scale": 0.0}).images, before.images, atol=1e-5)
    pipe.unload_lora_weights()
    after = call(pipe, "a cat")
    assert np.array_equal(before.images, after.images) and np.array_equal(before.depth, after.depth)


def test_the_pipeline_does_not_change_its_components(pipe):
    config = dict(pipe.depth_scheduler.config)
    call(pipe, "a cat", log2_alpha=-5.0)
    assert dict(pipe.depth_scheduler.config) == config and pipe.depth_scheduler.shift == config["shift"]


def test_half_precision_body(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = ModalityForcingPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    assert half.transformer.depth_head.proj_out.weight.dtype == torch.float32
    for output in (call(half, "a cat"), call(half, image=IMAGE)):
        assert output.depth.dtype == np.float32
        assert len(np.unique(output.depth)) > 0.9 * output.depth.size * output.depth_mask.mean()
