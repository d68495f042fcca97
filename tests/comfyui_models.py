"""Models in ComfyUI beside the library's: the same inputs, the same noise."""

import os
import sys

import numpy as np
import pytest
import torch
from tiny import make_pipeline, max_error

from mf_diffusers.modality_forcing.latent_tokens import position_ids
from mf_diffusers.modality_forcing.noise import velocity_from_clean


HEIGHT, WIDTH, TOKEN = 24, 32, 4


@pytest.fixture(scope="module")
def comfy():
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.model_detection
    import comfy.nested_tensor
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    from comfyui_nodes import model, z_image

    model.register()
    z_image.register()
    return comfy


@pytest.fixture(scope="module")
def pipeline():
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_library(transformer, image, depth, levels, context):
    rows, columns = image.shape[-2:]
    token = HEIGHT // rows
    tokens = depth.unflatten(2, (rows, token)).unflatten(4, (columns, token)).transpose(3, 4).flatten(4).flatten(1, 3)
    output = transformer(
        hidden_states=image.flatten(2).transpose(1, 2),
        encoder_hidden_states=context,
        timestep=levels[0],
        img_ids=position_ids(rows=rows, columns=columns),
        txt_ids=position_ids(length=context.shape[1]),
        depth_hidden_states=tokens,
        depth_timestep=levels[1],
        depth_ids=position_ids(time=1, rows=rows, columns=columns),
    )
    clean = output.depth_sample.unflatten(2, (token, token)).unflatten(1, (rows, columns)).transpose(2, 3)
    return output.sample.transpose(1, 2).unflatten(2, (rows, columns)), clean.flatten(3).flatten(1, 2)[:, None]


def inputs(context_dim=48, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 16, HEIGHT // TOKEN, WIDTH // TOKEN, generator=generator)
    depth = torch.randn(2, 1, HEIGHT, WIDTH, generator=generator)
    levels = [torch.rand(2, generator=generator), torch.rand(2, generator=generator)]
    return image.to(dtype), depth.to(dtype), levels, torch.randn(2, 7, context_dim, generator=generator).to(dtype)


@torch.no_grad()
def call_both(model, transformer, dtype=torch.float32):
    """Velocity of the image, and clean depth."""
    image, depth, levels, context = inputs(dtype=dtype)
    velocity, depth_velocity = model.model.diffusion_model([image, depth.float()], levels, context)
    clean = clean_from_velocity(depth.float(), depth_velocity, levels[1])
    return list(zip((velocity, clean), call_library(transformer, image, depth, levels, context)))


def clean_from_velocity(depth, velocity, level):
    """The inverse of the library's `velocity_from_clean`, by its slope."""
    still = velocity_from_clean(depth, torch.zeros_like(depth), level)
    slope = velocity_from_clean(depth, torch.ones_like(depth), level) - still
    return (velocity - still) / slope


class Sampling:
    """One pipeline on both sides, the same noise and noise levels."""

    def __init__(self, comfy, model, pipeline):
        self.comfy, self.model, self.pipeline = comfy, model, pipeline
        generator = torch.Generator().manual_seed(3)
        self.image_noise = torch.randn(1, 16, HEIGHT // TOKEN, WIDTH // TOKEN, generator=generator)
        self.depth_noise = torch.randn(1, 1, HEIGHT, WIDTH, generator=generator)
        self.image = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator)
        self.depth = torch.rand(1, 1, HEIGHT, WIDTH, generator=generator) + 0.3

    def sigmas(self, steps):
        even = np.linspace(1, 1 / steps, steps)
        return self.pipeline.prepare_scheduler(self.pipeline.scheduler, even, "cpu").sigmas.clone()

    def conds(self, prompt, **options):
        return [[self.pipeline.encode_prompt(prompt)[0].detach(), options]]

    @torch.no_grad()
    def ours(
        self,
        latent=None,
        mask=None,
        noise=None,
        cfg=4.0,
        sigmas=None,
        log2_alpha=None,
        sampler="euler",
        model=None,
        callback=None,
        prompt=None,
        positive=None,
    ):
        """Image and depth latents from ComfyUI's sampler; by default both are made."""
        nested = self.comfy.nested_tensor.NestedTensor
        noise = noise or [self.image_noise, self.depth_noise]
        model = (model or self.model).clone()
        if log2_alpha is not None:
            model.add_object_patch("log2_alpha", log2_alpha)
        samples = self.comfy.sample.sample_custom(
            model,
            nested(noise),
            cfg,
            self.comfy.samplers.sampler_object(sampler),
            self.sigmas(6) if sigmas is None else sigmas,
            positive or self.conds("a red ball", **(prompt or {})),
            self.conds(""),
            nested(latent or [torch.zeros_like(x) for x in noise]),
            noise_mask=nested(mask) if isinstance(mask, list) else mask,
            callback=callback,
            disable_pbar=True,
            seed=0,
        )
        return samples.unbind()

    def library(self, **inputs):
        """Image and depth tokens after the last step of the diffusers pipeline."""
        last = {}

        def keep(pipe, step, timestep, tensors):
            last.update(tensors)
            return {}

        self.pipeline(
            **{"prompt": "a red ball", "height": HEIGHT, "width": WIDTH, "num_inference_steps": 6} | inputs,
            output_type="latent",
            callback_on_step_end=keep,
        )
        return last["latents"], last["depth_latents"]

    def check(self, ours, reference):
        image, depth = ours
        assert max_error(image.flatten(2).transpose(1, 2), reference[0]) <= 1e-4
        if reference[1] is not None:
            assert max_error(self.pipeline.depth_processor.patchify(depth), reference[1]) <= 1e-4
