"""Tokenizers trained on captions, for text encoders that train along with a base."""

import math
from collections import Counter

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM, Qwen3Model, T5TokenizerFast, UMT5EncoderModel


CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}<|im_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_bpe(captions: list[str], vocabulary_size: int) -> Qwen2TokenizerFast:
    """A byte-level BPE tokenizer of Qwen's kind, trained on `captions`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
    )


def train_unigram(captions: list[str], vocabulary_size: int) -> T5TokenizerFast:
    """
    A Unigram tokenizer of T5's kind: the most frequent words of `captions` whole, by their log-frequency, and whatever
    else by characters. Counted, because `UnigramTrainer` makes another vocabulary every time, and processes and runs
    that go on need the same.
    """
    split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    counts = Counter(word for caption in captions for word, _ in split.pre_tokenize_str(caption) if len(word) > 1)
    start = ["<pad>", "</s>", "<unk>", "▁"]  # where T5's tokenizer looks for them
    characters = [chr(code) for code in range(33, 127)]
    words = counts.most_common(vocabulary_size - len(start) - len(characters))
    scores = [(word, math.log(count / counts.total())) for word, count in words]
    rare = -math.log(counts.total()) - 1
    return T5TokenizerFast(vocab=[*((piece, rare) for piece in [*start, *characters]), *scores], extra_ids=0)


TOKENIZERS = {  # by the text encoder that reads them
    Qwen3ForCausalLM: train_bpe,
    Qwen3Model: train_bpe,
    UMT5EncoderModel: train_unigram,
}
