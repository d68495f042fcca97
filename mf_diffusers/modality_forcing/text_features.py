"""Prompts to text features: those of FLUX.2 [klein] and Z-Image by Qwen3, the from-scratch family's by a T5 encoder."""

import torch
from diffusers.utils import logging
from transformers import (
    Qwen2TokenizerFast,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5EncoderModel,
)


logger = logging.get_logger(__name__)


def encode_qwen3(
    text_encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2TokenizerFast,
    prompts: list[str],
    out_layers: list[int],
    max_sequence_length: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Qwen3 reads a prompt as a chat turn; its features are hidden layers side by side, padding included, on which FLUX.2
    [klein] was trained.

    Args:
        prompts: B texts; what is longer than `max_sequence_length` tokens is cut off, with a warning.
        out_layers: hidden layers to put side by side.
        max_sequence_length: L; shorter prompts are padded to it.
        device: of the text encoder's inputs. Default: that of its weights.

    Returns:
        (B, L, len(out_layers) times the hidden size), in the text encoder's dtype.
    """
    tokens = _chat_tokens(tokenizer, prompts, max_sequence_length, enable_thinking=False)
    return _qwen3_features(text_encoder, tokens.to(device or text_encoder.device), out_layers)


def encode_qwen3_without_padding(
    text_encoder: Qwen3Model,
    tokenizer: Qwen2TokenizerFast,
    prompts: list[str],
    out_layers: list[int],
    max_sequence_length: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    As [`encode_qwen3`] for Z-Image, which was trained on the turn of a model that may think, and without padding: the
    features of padding are 0, by which the transformer knows it.
    """
    tokens = _chat_tokens(tokenizer, prompts, max_sequence_length, enable_thinking=True)
    features = _qwen3_features(text_encoder, tokens.to(device or text_encoder.device), out_layers)
    return features * tokens.attention_mask[..., None].to(features)


def encode_t5(
    text_encoder: UMT5EncoderModel | T5EncoderModel,
    tokenizer: T5TokenizerFast,
    prompts: list[str],
    out_layers: list[int],
    max_sequence_length: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    A T5 encoder reads a prompt as it is; its features are the last hidden state, 0 where the prompt is padded: what it
    makes of padding means nothing, and zeros need no mask in the transformer's attention.

    Args:
        out_layers: of no concern: it is always the last.
        The rest: as for [`encode_qwen3`].

    Returns:
        (B, L, T5's d_model), in the text encoder's dtype.
    """
    tokens = _tokens(tokenizer, prompts, max_sequence_length).to(device or text_encoder.device)
    features = text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return features * tokens.attention_mask[..., None].to(features.dtype)


def _chat_tokens(tokenizer, prompts, max_sequence_length, enable_thinking):
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )
        for prompt in prompts
    ]
    return _tokens(tokenizer, texts, max_sequence_length)


def _qwen3_features(text_encoder, tokens, out_layers):
    has_logits = isinstance(text_encoder, Qwen3ForCausalLM)
    hidden_states = text_encoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        output_hidden_states=True,
        use_cache=False,
        **({"logits_to_keep": 1} if has_logits else {}),  # they are not used
    ).hidden_states
    return torch.cat([hidden_states[layer] for layer in out_layers], dim=-1)


def _tokens(tokenizer, texts: list[str], max_sequence_length: int):
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    if longest > max_sequence_length:
        logger.warning(
            f"The prompt has {longest} tokens, the text encoder takes {max_sequence_length}: the rest is cut off."
        )
    return tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=max_sequence_length)
