"""Depth over model size and text-to-image pre-training: the paper's Fig. 4 at the size that the hardware allows.

    python finetune/scaling_study.py [--estimate] [key=value ...]

Pre-trains every rung of the from-scratch family on captioned scenes, post-trains it in the same way from each budget of
pre-training, none among them, and measures image -> depth on held-out scenes. Writes `scaling.json`, `scaling.md` and
`scaling.png` into the output folder. Whatever was trained or measured before is kept: the command goes on where it was
stopped. `--estimate` times a few steps of every rung and prints what the whole would cost; nothing is trained.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats


sys.path.append(str(Path(__file__).parents[1]))  # running a file puts its folder on the path, not the repository

from finetune.config import load_config, take_flag
from finetune.data.sources import build_source
from finetune.measures.studies import (
    Measurements,
    in_one_and_four_steps,
    load_pipeline,
    over_seeds,
    publish,
    run_script,
    table_cell,
)
from mf_diffusers.errors import errors_as_lines


CONFIGS = Path(__file__).parent / "configs"
METRICS = {
    "abs_rel_one_step": "AbsRel %, 1 step",
    "delta1_one_step": "delta1 %, 1 step",
    "abs_rel": "AbsRel %, 4 steps",
    "delta1": "delta1 %, 4 steps",
}


@dataclass
class ScalingConfig:
    """
    Args:
        rungs: settings of pre-training in finetune/configs, smallest model first.
        budgets: samples of pre-training to compare, ascending; 0 is none.
        seeds: of pre-training and post-training alike; tables give the mean and the range over them.
        batch_size: of both.
        post_training_samples: the same for every model.
        training: settings of every run besides its own.
        validation_data: the held-out scenes.
        scenes: how many of them image -> depth is measured on.
    """

    rungs: list[str] = field(default_factory=lambda: ["dit_500k", "dit_2m", "dit_8m"])
    budgets: list[int] = field(default_factory=lambda: [0, 1600, 6400, 25600])
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    batch_size: int = 16
    post_training_samples: int = 6400
    vae: str = "mf_diffusers/embedded/model"
    output: str = "outputs/scaling"
    training: list[str] = field(default_factory=list)
    validation_data: dict = field(
        default_factory=lambda: {"kind": "scenes", "split": "validation", "height": 64, "width": 64}
    )
    scenes: int = 200

    @property
    def batch(self) -> list[str]:
        return [f"trainer.batch_size={self.batch_size}", f"trainer.micro_batch_size={self.batch_size}"]


def estimate(config: ScalingConfig) -> str:
    """The hours of training that the study takes on this device, by finetune/benchmark.py, a line for each rung."""
    results = Path(config.output) / "estimate.jsonl"
    results.unlink(missing_ok=True)
    lines, total = [], 0.0
    for rung in config.rungs:
        settings, both = CONFIGS / f"{rung}.yaml", [*config.training, *config.batch, f"benchmark.output={results}"]
        frozen_text = ["pretrained_text_encoder=shared", "text_encoder=null", f"vae={config.vae}"]
        run_script("benchmark.py", "--pretrain", "--config", settings, *frozen_text, *both)
        of_rung = ["base=none", f"base_settings={settings}"]
        run_script("benchmark.py", "--config", CONFIGS / "dit_post_train.yaml", *of_rung, *both)
        before, after = (json.loads(line)["samples_per_second"] for line in results.read_text().splitlines()[-2:])
        each = config.budgets[-1] / before + len(config.budgets) * config.post_training_samples / after
        hours = len(config.seeds) * each / 3600
        lines.append(f"{rung}: {before:.3g} samples/s, with depth {after:.3g}, {hours:.2f} h")
        total += hours
    return "\n".join([*lines, f"in all {total:.2f} h, and to encode, to compile and to measure besides"])


def pretrain(config: ScalingConfig, rung: str, folder: Path, samples: int, *settings: str) -> None:
    """Pre-trains a rung on `samples`, with a checkpoint at every budget."""
    steps = [budget // config.batch_size for budget in config.budgets if 0 < budget <= samples]
    run_script(
        "pretrain.py",
        "--config",
        CONFIGS / f"{rung}.yaml",
        f"vae={config.vae}",
        *config.training,
        *config.batch,
        *settings,
        f"trainer.output={folder}",
        f"trainer.steps={samples // config.batch_size}",
        f"trainer.checkpoint_every={int(np.gcd.reduce(steps or [1]))}",
        "trainer.keep_checkpoints=1000",
    )


def text_encoder(config: ScalingConfig) -> list[str]:
    """
    Settings of the text encoder that all runs share, frozen, as the paper's do theirs. Theirs is UMT5-XXL; here it is
    one that the smallest rung trained along, on the largest budget.
    """
    folder = Path(config.output) / "text_encoder"
    if not (folder / "pipeline").is_dir():
        pretrain(config, config.rungs[0], folder, config.budgets[-1])
    return [f"pretrained_text_encoder={folder / 'pipeline'}", "text_encoder=null", "cache.text=true"]


def base(config: ScalingConfig, rung: str, budget: int, seed: int) -> Path:
    """The text-to-image pipeline of a rung after a budget. Larger budgets go on from smaller ones."""
    run = Path(config.output) / rung / f"seed-{seed}"
    pipeline = run / f"base-{budget}"
    if pipeline.is_dir():
        return pipeline
    settings = [*text_encoder(config), f"trainer.seed={seed}"]
    if budget == 0:
        pretrain(config, rung, run / "untrained", 0, *settings)
        return (run / "untrained" / "pipeline").rename(pipeline)
    checkpoint = run / "pretraining" / "checkpoints" / f"step-{budget // config.batch_size:08}"
    if not checkpoint.is_dir():
        pretrain(config, rung, run / "pretraining", config.budgets[-1], *settings)
    run_script("consolidate.py", checkpoint, pipeline)
    return pipeline


def post_train(config: ScalingConfig, rung: str, budget: int, seed: int) -> Path:
    """The post-trained pipeline of a rung that was pre-trained on a budget."""
    folder = Path(config.output) / rung / f"seed-{seed}" / f"model-{budget}"
    if not (folder / "pipeline").is_dir():
        steps = config.post_training_samples // config.batch_size
        run_script(
            "post_train.py",
            "--config",
            CONFIGS / "dit_post_train.yaml",
            f"base={base(config, rung, budget, seed)}",
            *config.training,
            *config.batch,
            f"trainer.seed={seed}",
            f"trainer.output={folder}",
            f"trainer.steps={steps}",
            f"trainer.cooldown_steps={steps // 2}",
            "trainer.keep_checkpoints=1",
        )
    return folder / "pipeline"


def measure(config: ScalingConfig) -> dict[str, dict[str, float]]:
    """Depth errors of every rung, budget and seed, with the parameters of the text-to-image transformer."""
    source = build_source(config.validation_data)
    measured = Measurements(Path(config.output) / "scaling.json")

    def errors(rung: str, budget: int, seed: int) -> dict[str, float]:
        model = load_pipeline(post_train(config, rung, budget, seed))
        names = dict(model.transformer.named_parameters())
        parameters = sum(p.numel() for name, p in names.items() if "depth" not in name)
        return {"parameters": parameters, "samples": budget} | in_one_and_four_steps(model, source, config.scenes)

    for seed in config.seeds:
        for rung in config.rungs:
            for budget in config.budgets:
                measured(f"{rung}, {budget}, seed {seed}", lambda r=rung, b=budget, s=seed: errors(r, b, s))
    return measured.numbers


def fit(numbers: dict[str, dict[str, float]], metric: str) -> dict[str, tuple[float, float]]:
    """
    Least squares of log10(metric) over log10(parameters) and log10(samples), over the runs that were pre-trained.

    Returns:
        Slope of each axis and the half width of its 95% confidence interval (Student's t).
    """
    rows = [row for row in numbers.values() if row["samples"]]
    design = np.array([[1, np.log10(row["parameters"]), np.log10(row["samples"])] for row in rows])
    target = np.log10([row[metric] for row in rows])
    slopes, *_ = np.linalg.lstsq(design, target)
    freedom = len(rows) - design.shape[1]
    variance = np.square(target - design @ slopes).sum() / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    widths = stats.t.ppf(0.975, freedom) * errors
    return {axis: (slopes[i], widths[i]) for i, axis in enumerate(("parameters", "samples"), start=1)}


def write_tables(numbers: dict[str, dict[str, float]], config: ScalingConfig) -> str:
    """Markdown: what was measured, in percent, ± half the range over seeds; and the fitted slopes."""
    lines = ["| rung | parameters | pre-trained on | " + " | ".join(METRICS.values()) + " |", "|---" * 7 + "|"]
    for rung in config.rungs:
        for budget in config.budgets:
            name = f"{rung}, {budget}"
            parameters = over_seeds(numbers, name, "parameters", config.seeds)[0] / 1e6
            cells = [table_cell(over_seeds(numbers, name, metric, config.seeds)) for metric in METRICS]
            lines.append(f"| {rung} | {parameters:.1f}M | {budget} samples | " + " | ".join(cells) + " |")
    lines.append("")
    for metric in ("abs_rel_one_step", "abs_rel"):
        for axis, (slope, width) in fit(numbers, metric).items():
            lines.append(f"- {METRICS[metric]}: slope {slope:+.3f} ± {width:.3f} (95%) of its log10 over log10({axis})")
    return "\n".join(lines) + "\n"


def draw_figure(
    numbers: dict[str, dict[str, float]], config: ScalingConfig, metric: str = "abs_rel_one_step"
) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)

    def points(rung, budget):
        return over_seeds(numbers, f"{rung}, {budget}", metric, config.seeds)

    places = range(len(config.budgets))
    sizes = [over_seeds(numbers, f"{rung}, 0", "parameters", config.seeds)[0] for rung in config.rungs]
    shades = np.linspace(0.25, 0.85, max(len(config.rungs), len(config.budgets)))
    for rung, size, shade in zip(config.rungs, sizes, shades):
        values = [points(rung, budget) for budget in config.budgets]
        color = (0.1, 0.3 + 0.5 * (1 - shade), shade)
        left.plot(places, [100 * np.mean(v) for v in values], "o-", color=color, label=f"{size / 1e6:.1f}M parameters")
        for place, seeds in zip(places, values):
            left.plot([place] * len(seeds), 100 * np.array(seeds), ".", color=color, markersize=4)
    left.set_xticks(places, [f"{budget:,}" if budget else "none" for budget in config.budgets])
    left.set_xlabel("samples of text-to-image pre-training")
    left.set_ylabel(METRICS[metric] + ", held-out scenes")
    for budget, shade in zip(config.budgets, shades):
        values = [points(rung, budget) for rung in config.rungs]
        color = (shade, 0.35, 0.2 + 0.6 * (1 - shade))
        label = f"{budget:,} samples" if budget else "not pre-trained"
        right.plot(sizes, [100 * np.mean(v) for v in values], "o-", color=color, label=label)
        for size, seeds in zip(sizes, values):
            right.plot([size] * len(seeds), 100 * np.array(seeds), ".", color=color, markersize=4)
    right.set_xscale("log")
    right.set_xticks(sizes, [f"{size / 1e6:.1f}M" for size in sizes])
    right.minorticks_off()
    right.set_xlabel("parameters of the text-to-image transformer")
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    is_estimate = take_flag("--estimate")
    config = load_config(ScalingConfig, ["--config", str(CONFIGS / "scaling.yaml"), *sys.argv[1:]])
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    if is_estimate:
        print(estimate(config))
        return
    numbers = measure(config)
    publish(folder / "scaling", write_tables(numbers, config), draw_figure(numbers, config))


if __name__ == "__main__":
    with errors_as_lines():
        main()
