"""A run before it starts: whether its settings go with the launch, and with the checkpoints that are in its folder."""

import json

from accelerate import PartialState

from finetune.training.sharding import is_sharding_asked
from finetune.training.trainer import BEGIN_ANEW, TrainerConfig, checkpoints


def check_start(config: TrainerConfig) -> None:
    """Stops, before anything expensive, a run that would stop later. The processes have joined before.

    Raises:
        SystemExit: the processes cannot share a batch equally, or shards need another optimiser; or there are
            checkpoints, from which the run must not go on, or cannot.
    """
    processes = PartialState().num_processes
    if config.batch_size % (config.micro_batch_size * processes):
        raise SystemExit(
            f"error: batch_size {config.batch_size} must be a multiple of micro_batch_size {config.micro_batch_size} "
            f"times {processes} processes"
        )
    if is_sharding_asked() and config.optimizer != "adamw":
        raise SystemExit(f"error: a sharded run needs optimizer=adamw, not {config.optimizer}")
    if not checkpoints(config.output):
        return
    newest = checkpoints(config.output)[-1]
    if not config.resume:
        raise SystemExit(
            f"error: {newest.parent} has checkpoints already and trainer.resume is false: {BEGIN_ANEW}; "
            "trainer.resume=true goes on from the newest"
        )
    state = json.loads((newest / "state.json").read_text())
    optimizer = state.get("optimizer", config.optimizer)  # older checkpoints do not say
    if optimizer != config.optimizer:
        raise SystemExit(
            f"error: {newest} goes on with trainer.optimizer={optimizer}, not {config.optimizer}; {BEGIN_ANEW}"
        )
    if config.ema_decay and "ema_steps" not in state:
        raise SystemExit(
            f"error: {newest} has no averaged weights and goes on with trainer.ema_decay=0 only; {BEGIN_ANEW}"
        )
