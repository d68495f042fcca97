"""A checkpoint, also one in shards, as one pipeline folder.

    python finetune/consolidate.py CHECKPOINT PIPELINE

CHECKPOINT is a folder OUTPUT/checkpoints/step-... of finetune/pretrain.py or post_train.py, whatever the number of
processes that wrote it; the settings of the run are in OUTPUT/config.yaml. PIPELINE is the folder to write; of a run
in "lora" mode, PIPELINE.adapter.safetensors besides.
"""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))  # running a file puts its folder on the path, not the repository

from finetune import post_train, pretrain
from finetune.config import load_config
from mf_diffusers.errors import errors_as_lines


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: consolidate.py CHECKPOINT PIPELINE")
    checkpoint, folder = map(Path, sys.argv[1:])
    settings = checkpoint.absolute().parents[1] / "config.yaml"
    for path in (checkpoint / "state.json", settings):
        if not path.is_file():
            raise SystemExit(f"error: {checkpoint} is no checkpoint of a run: there is no {path}")
    if folder.exists():
        raise SystemExit(f"error: {folder} exists already")
    is_pretraining = any(line.startswith("vae:") for line in settings.read_text(encoding="utf-8").splitlines())
    script = pretrain if is_pretraining else post_train
    config_class = pretrain.PretrainConfig if is_pretraining else post_train.PostTrainConfig
    config = load_config(config_class, ["--config", str(settings)])
    script.consolidate(config, checkpoint, folder)


if __name__ == "__main__":
    with errors_as_lines():
        main()
