"""Tiny instances of the real classes, with random weights."""

import math
import re

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from mf_diffusers import (
    DepthProcessor,
    ModalityForcingDiTTransformer2DModel,
    ModalityForcingFlux2Transformer2DModel,
    ModalityForcingPipeline,
)
from mf_diffusers.modality_forcing.conversion import AUTOENCODER_KEYS
from mf_diffusers.modality_forcing.depth_processor import contract
from mf_diffusers.modality_forcing.latent_tokens import position_ids


TINY_TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (4, 4, 4, 4),
    "depth_channels": 16,
    "num_depth_decoder_layers": 1,
}
TINY_QWEN3 = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
TINY_VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TINY_DIT = {
    "in_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "joint_attention_dim": 24,
    "time_channels": 32,
    "time_embed_dim": 16,
    "axes_dims_rope": (2, 2, 2, 2),
}
TINY_DEPTH_DIT = TINY_DIT | {"depth_channels": 16, "num_depth_decoder_layers": 2}
TINY_T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Moves parameters that start at zero (mixers, heads) away from it, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def transformer_inputs(text_channels: int, depth: bool = True, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """What a tiny transformer takes: six tokens of each stream, of 16 values, and five of text."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(batch_size, 6, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch_size, 5, text_channels, generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "img_ids": position_ids(rows=2, columns=3),
        "txt_ids": position_ids(length=5),
    }
    if depth:
        inputs["depth_hidden_states"] = torch.randn(batch_size, 6, 16, generator=generator)
        inputs["depth_timestep"] = torch.rand(batch_size, generator=generator)
        inputs["depth_ids"] = position_ids(time=1, rows=2, columns=3)
    return inputs


def predict(model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RGB velocity and clean depth."""
    with torch.no_grad():
        output = model(**inputs)
    return output.sample, output.depth_sample


def close(a, b, **tolerance) -> bool:
    """Whether two sequences of tensors are, one by one."""
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(a, b, strict=True))


def make_tokenizer() -> Qwen2TokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
    )


def make_pipeline(**transformer_kwargs) -> ModalityForcingPipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **TINY_QWEN3))
    vae = AutoencoderKLFlux2(
        **TINY_VAE,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return ModalityForcingPipeline(
        transformer=randomize(ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER | transformer_kwargs)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)),
        depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        depth_processor=DepthProcessor(patch_size=4),
        text_encoder_out_layers=(1, 2, 3),
        max_sequence_length=64,
        default_sample_size=32,
    )


def close_depth(ours, other, atol: float = 1e-5) -> bool:
    """Whether depth maps are alike in what the model makes, contracted depth: of depth near 0, or of depth far away, a
    relative bound asks for more than its products have, and processors differ."""
    return torch.allclose(*(contract(torch.as_tensor(depth)) for depth in (ours, other)), rtol=0, atol=atol)


def make_t5_tokenizer() -> T5TokenizerFast:
    """Characters as the vocabulary of a T5 tokenizer."""
    special = ["<pad>", "</s>", "<unk>", "▁"]
    letters = [chr(c) for c in range(33, 127)]
    return T5TokenizerFast(vocab=[(piece, 0.0) for piece in special + letters], extra_ids=0)


def make_dit_pipeline(depth: bool = True) -> ModalityForcingPipeline:
    torch.manual_seed(0)
    tokenizer = make_t5_tokenizer()
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TINY_T5))
    pipe = ModalityForcingPipeline(
        transformer=randomize(ModalityForcingDiTTransformer2DModel(**TINY_DEPTH_DIT if depth else TINY_DIT)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)),
        depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)) if depth else None,
        vae=make_pipeline().vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        depth_processor=DepthProcessor(patch_size=4) if depth else None,
        max_sequence_length=24,
        default_sample_size=32,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def published_autoencoder(state_dict, half, depth=2):
    """The inverse of `convert_published_autoencoder`, for one half."""
    renamed = {}
    for key, tensor in state_dict.items():
        if key.startswith(f"{half}."):
            key = key.removeprefix(f"{half}.").replace("conv_shortcut", "nin_shortcut")
            for old, new in AUTOENCODER_KEYS.items():
                pattern = re.escape(new).replace("N", r"(?P<N>\d+)").replace("M", r"(?P<M>\d+)")
                found = re.match(pattern, key)
                if found:
                    numbers = {name: int(number) for name, number in found.groupdict().items()}
                    if old.startswith("up."):
                        numbers["N"] = depth - 1 - numbers["N"]
                    for name, number in numbers.items():
                        old = old.replace(f".{name}.", f".{number}.")
                    key = old + key[found.end() :]
                    break
            if re.match(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", key):
                tensor = tensor[:, :, None, None]
        elif not key.startswith(("bn.", {"encoder": "quant_conv.", "decoder": "post_quant_conv."}[half])):
            continue
        renamed[key] = tensor.contiguous()
    return renamed


def max_error(ours, reference):
    error = (ours - reference).abs().max().item()
    print(f"max error {error:.1e}")  # shown by pytest -rP
    return error
