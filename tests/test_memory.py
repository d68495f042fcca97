"""Whether a run fits into memory: the verdict, the settings that fit, and what sharding divides."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_pipeline
from training_runs import run, settings
from transformers import Qwen3Config, Qwen3ForCausalLM, UMT5Config, UMT5EncoderModel

from finetune import post_train
from finetune.config import load_config
from finetune.data.cache import CacheConfig
from finetune.post_train import PostTrainConfig
from finetune.preflight import memory
from finetune.preflight.memory import SHARDED_LAUNCH, Launch
from finetune.pretrain import PretrainConfig, TextToImage
from finetune.training.models import live_text_encoder, live_text_encoder_of_base
from finetune.training.trainer import TrainerConfig, join_processes


pytest_plugins = ["training_runs"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


CONFIGS = Path(__file__).parents[1] / "finetune" / "configs"
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
GIB = 2**30


def needs_of(trainer: TrainerConfig, launch: Launch) -> dict[str, int]:
    """A made-up model: 8 GiB of weights, and activations of 1 GiB a sample, or a quarter of it."""
    weights = 8 * GIB // (launch.processes if launch.is_sharded else 1)
    optimizer = 2 * weights if trainer.optimizer == "adamw" else weights // 2
    activations = trainer.micro_batch_size * GIB // (4 if trainer.gradient_checkpointing else 1)
    return {"weights": weights, "optimizer": optimizer, "activations": activations}


def verdict(**chosen) -> tuple[bool, str]:
    join_processes()
    config = PostTrainConfig(trainer=TrainerConfig(batch_size=16, micro_batch_size=8, **chosen))
    return memory.memory_verdict(config, lambda c, launch: needs_of(c.trainer, launch))


def test_verdicts():
    fits, text = verdict(memory_gib=39)
    assert fits and text == "memory: fits: a training step needs 32.00 GiB, and a process may use 39.00 GiB"
    fits, text = verdict(memory_gib=33)
    assert fits and "close: the estimate leaves out as much as a fifth" in text and "1e6" not in text
    fits, text = verdict(memory_gib=31)
    assert not fits and "does not fit: a training step needs 32.00 GiB, and a process may use 31.00 GiB" in text
    assert text.splitlines()[2:] == [
        "    25.00 GiB  trainer.micro_batch_size=1",
        "    20.00 GiB  trainer.optimizer=adamw8bit",
        f"    20.00 GiB  {SHARDED_LAUNCH} 2 ...",
        "trainer.memory_gib=1e6 goes on all the same.",
    ]
    assert verdict(memory_gib=1e6)[0]


def test_several_changes_where_one_is_too_little():
    lines = verdict(memory_gib=10, optimizer="adamw8bit")[1].splitlines()
    assert lines[1] == "None of these fit, alone or together, with a fifth to spare: " + (
        "trainer.micro_batch_size, trainer.gradient_checkpointing, trainer.ema_decay, "
        f"{SHARDED_LAUNCH}; the least is 12.25 GiB."
    )
    lines = verdict(memory_gib=5)[1].splitlines()
    assert lines[2] == f"     4.00 GiB  {SHARDED_LAUNCH} 8 ... trainer.micro_batch_size=1" and len(lines) == 4


def test_a_sharded_step_divides_what_it_can():
    model = make_pipeline().transformer
    trained = 4 * sum(p.numel() for p in model.parameters())
    blocks = [
        sum(p.numel() for p in b.parameters()) for b in model.modules() if type(b).__name__ in model._no_split_modules
    ]
    assert len(blocks) == 5
    config = TrainerConfig(batch_size=8, micro_batch_size=2, mixed_precision="bf16")
    stacks = [(4, 576, 32, 3.0)]
    frozen, weights, gradients, optimizer, averaged, copies, _, activations, gathered = memory.memory(
        model, config, stacks, launch=Launch(4, is_sharded=True)
    ).values()
    assert frozen == copies == 0 and weights == gradients == averaged == trained // 4 and optimizer == trained // 2
    assert gathered == 2 * 2 * (trained // 4 - sum(blocks) + 2 * max(blocks))
    alone = memory.memory(model, config, stacks)
    assert activations == memory.activation_bytes(stacks, config) == list(alone.values())[-1]
    accumulating = memory.memory(model, config, stacks, launch=Launch(2, is_sharded=True))
    assert accumulating["their gradients, float32"] == trained  # exchanged at the last micro batch only
    deepspeed = memory.memory(model, config, stacks, launch=Launch(2, is_sharded=True, by_deepspeed=True))
    assert deepspeed["their gradients, float32"] == trained // 2 and deepspeed["trainable weights, float32"] == trained
    assert list(deepspeed.values())[-1] == 2 * gathered
    replicas = memory.memory(model, config, stacks, launch=Launch(4))
    assert replicas.pop("copy of the gradients that processes exchange") == trained and replicas == alone


def test_the_device_says_what_there_is(monkeypatch):
    join_processes()
    alone = memory.available_bytes(TrainerConfig())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_bytes(TrainerConfig()) == pytest.approx(alone / 4, rel=0.1)
    assert memory.available_bytes(TrainerConfig(memory_gib=1.5)) == 1.5 * GIB


def test_klein_4b_on_48_gib():
    chosen = ["--config", str(CONFIGS / "klein_4b_full.yaml"), "trainer.memory_gib=48"]
    join_processes()
    fits, text = post_train.check_memory(load_config(PostTrainConfig, chosen))
    assert not fits and "needs 90.55 GiB" in text
    found = [line.split() for line in text.splitlines()[2:-1]]
    assert ["35.53", "GiB", "mode=lora"] in found and any(words[2] == "accelerate" for words in found)
    assert all(1.2 * float(words[0]) <= 48 for words in found)


def test_a_frozen_text_encoder_counts_where_there_is_no_cache(base):
    config = load_config(PretrainConfig, ["--config", str(CONFIGS / "dit_370m.yaml")])
    with torch.device("meta"):
        model, umt5_xxl = TextToImage(config, None), UMT5EncoderModel(UMT5Config(**UMT5_XXL))
    name = config.pretrained_text_encoder
    parameters = live_text_encoder(config, name)
    assert parameters == sum(p.numel() for p in umt5_xxl.parameters())
    join_processes()
    without = sum(memory.pretraining_memory(config, model, 16, 0).values())
    assert sum(memory.pretraining_memory(config, model, 16, parameters).values()) - without == 2 * parameters
    assert live_text_encoder(config, None) == 0  # it trains along
    config.cache.folder = "cache"
    assert live_text_encoder(config, name) == 0

    flux2 = PostTrainConfig(base=str(base), cache=CacheConfig(folder=None))
    own = sum(p.numel() for p in make_pipeline().text_encoder.parameters())
    assert live_text_encoder_of_base(flux2) == own
    read = replace(flux2, architecture="dit", base="nowhere", base_settings=str(CONFIGS / "dit_370m.yaml"))
    assert live_text_encoder_of_base(read) == parameters
    assert live_text_encoder_of_base(replace(flux2, base="nowhere")) == 0


@pytest.mark.parametrize(
    ("klein", "sizes"),
    [
        ("black-forest-labs/FLUX.2-klein-base-4B", {"hidden_size": 2560, "intermediate_size": 9728}),
        ("black-forest-labs/FLUX.2-klein-base-9B", {"hidden_size": 4096, "intermediate_size": 12288}),
    ],
)
def test_the_text_encoders_of_klein(klein, sizes):
    common = {"num_hidden_layers": 36, "num_key_value_heads": 8, "tie_word_embeddings": sizes["hidden_size"] == 2560}
    with torch.device("meta"):
        qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, **common))
    config = PostTrainConfig(base=klein, cache=CacheConfig(folder=None))
    assert live_text_encoder_of_base(config) == sum(p.numel() for p in qwen3.parameters())


def test_a_run_that_does_not_fit_stops_before_anything_is_written(base, tmp_path, monkeypatch, capsys):
    arguments = [*settings(base, tmp_path / "cache", tmp_path / "run"), "trainer.memory_gib=0.001"]
    with pytest.raises(SystemExit, match=r"error: memory: does not fit: .* 0.00 GiB[^1]*trainer.memory_gib=1e6"):
        run(post_train, arguments, tmp_path, monkeypatch)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    run(post_train, ["--dry-run", *arguments], tmp_path, monkeypatch)
    assert "memory: does not fit" in capsys.readouterr().out
    run(post_train, ["--dry-run", *arguments, "trainer.memory_gib=1"], tmp_path, monkeypatch)
    assert "memory: fits: a training step needs 0.0" in capsys.readouterr().out
