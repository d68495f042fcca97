"""Tiny instances of Z-Image's components, with random weights, and pipelines of them."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny import TINY_QWEN3, TINY_VAE, make_tokenizer, randomize
from transformers import Qwen3Config, Qwen3Model

from mf_diffusers import ModalityForcingPipeline


TINY_Z_IMAGE = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [8, 8, 8],
    "axes_lens": [128, 64, 64],
}
# What a model that may think sees differs from what another sees.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}{% if enable_thinking is false %}no{% endif %}"
)


def make_z_image(seed: int = 0) -> ZImagePipeline:
    """A text-to-image pipeline; the transformer alone depends on the seed."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    text_encoder = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **TINY_QWEN3))
    vae = AutoencoderKL(
        **TINY_VAE,
        scaling_factor=0.7,
        shift_factor=0.2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    torch.manual_seed(seed)
    transformer = randomize(ZImageTransformer2DModel(**TINY_Z_IMAGE))
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_z_image_pipeline(**graft_config) -> ModalityForcingPipeline:
    """A graft whose depth modules are no longer at their start."""
    pipeline = graft(make_z_image(), graft_config=graft_config)
    randomize(pipeline.transformer)
    return pipeline


def graft(base: ZImagePipeline, **kwargs) -> ModalityForcingPipeline:
    torch.manual_seed(2)
    settings = {"text_encoder_out_layers": [3], "max_sequence_length": 64, "default_sample_size": 32}
    pipeline = ModalityForcingPipeline.from_base(base, num_depth_decoder_layers=1, **settings | kwargs)
    pipeline.transformer.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
