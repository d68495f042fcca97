"""A run before it starts: whether it may go on from the checkpoints that are in its folder."""

from finetune.trainer import BEGIN_ANEW, TrainerConfig, checkpoints


def check_start(config: TrainerConfig) -> None:
    """Stops, before anything expensive, a run that could not go on from what is in its folder.

    Raises:
        SystemExit: there are checkpoints, and the run must not go on from them.
    """
    found = checkpoints(config.output)
    if found and not config.resume:
        raise SystemExit(
            f"error: {found[0].parent} has checkpoints already and trainer.resume is false: {BEGIN_ANEW}; "
            "trainer.resume=true goes on from the newest"
        )
