"""Prompts to the text features of FLUX.2 [klein]: hidden states of Qwen3 over the prompt as a chat turn."""

import torch
from diffusers.utils import logging
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM


logger = logging.get_logger(__name__)


def encode_text(
    text_encoder: Qwen3ForCausalLM,
    tokenizer: Qwen2TokenizerFast,
    prompts: list[str],
    out_layers: list[int],
    max_sequence_length: int,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Args:
        prompts: B texts; what is longer than `max_sequence_length` tokens is cut off, with a warning.
        out_layers: hidden layers to put side by side.
        max_sequence_length: L; shorter prompts are padded to it, and the padding is kept.

    Returns:
        (B, L, len(out_layers) * hidden size), in the text encoder's dtype.
    """
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for prompt in prompts
    ]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    if longest > max_sequence_length:
        logger.warning(
            f"The prompt has {longest} tokens, the text encoder takes {max_sequence_length}: the rest is cut off."
        )
    tokens = tokenizer(
        texts, return_tensors="pt", padding="max_length", truncation=True, max_length=max_sequence_length
    ).to(device or text_encoder.device)
    hidden_states = text_encoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        output_hidden_states=True,
        use_cache=False,
        logits_to_keep=1,  # the logits are not used
    ).hidden_states
    return torch.cat([hidden_states[layer] for layer in out_layers], dim=-1)
