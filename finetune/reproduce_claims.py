"""Re-measures the paper's claims at the scale of the embedded model, on held-out scenes.

    python finetune/reproduce_claims.py [--quick] [key=value ...]

Trains what the claims compare with finetune/post_train.py, every run with every seed at the same budget, and writes
`claims.json`, `claims.md` and `claims.png` into the output folder. Whatever was trained or measured before is kept: the
command goes on where it was stopped. `--quick` takes the settings of finetune/configs/claims_quick.yaml: minutes, and
numbers that prove no more than that the command runs.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from matplotlib.figure import Figure


sys.path.append(str(Path(__file__).parents[1]))  # as the other scripts, which the launcher starts

from finetune.config import load_config, take_flag
from finetune.data.sources import Source, build_source
from finetune.measures.image_tasks import ImageTasks, mean_of
from finetune.measures.studies import (
    Measurements,
    image_to_depth,
    in_one_and_four_steps,
    load_pipeline,
    over_seeds,
    publish,
    run_script,
    table_cell,
)
from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.alignment import align_affine_robust
from mf_diffusers.depth_io import as_depth_map
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.evaluation.metrics import depth_metrics
from mf_diffusers.files import save_whole
from mf_diffusers.modality_forcing.latent_tokens import image_to_tokens, position_ids
from mf_diffusers.modality_forcing.noise import add_noise


CONFIGS = Path(__file__).parent / "configs"
PRETRAINING = ["mode=all", "objective.distillation_high=0", "objective.distillation_low=0"]

# What is trained: name, and how it differs from finetune/configs/embedded.yaml with the settings of claims.yaml.
RUNS = {
    "10% of the pixels": [],
    "dense": ["cache.depth_density=1.0"],
    "5% of the pixels": ["cache.depth_density=0.05"],
    "1% of the pixels": ["cache.depth_density=0.01"],
    "pre-trained": PRETRAINING,
    "not pre-trained": [*PRETRAINING, "base={output}/random_base"],
    "distillation 0 / 0": ["objective.distillation_high=0", "objective.distillation_low=0"],
    "distillation 0.5 / 0.5": ["objective.distillation_high=0.5", "objective.distillation_low=0.5"],
    "distillation 2 / 0.4": ["objective.distillation_high=2.0", "objective.distillation_low=0.4"],
    "depth weight 0.3": ["objective.depth_weight=0.3"],
    "depth weight 3": ["objective.depth_weight=3.0"],
}
COLUMNS = {
    "abs_rel": "AbsRel %, 4 steps",
    "delta1": "delta1 %, 4 steps",
    "abs_rel_one_step": "AbsRel %, 1 step",
    "drift": "drift %",
}
BASELINES = ("constant depth", "untrained")
TABLES = {
    "(a) Image to depth of the embedded model": ("embedded model", *BASELINES),
    "(b) Valid depth pixels in training": ("dense", "10% of the pixels", "5% of the pixels", "1% of the pixels"),
    "(c) Text-to-image pre-training": ("pre-trained", "not pre-trained"),
    "(e) Self-distillation, high / low": (
        "10% of the pixels",  # 0.5 / 0.1, as claims.yaml has it
        "distillation 0 / 0",
        "distillation 0.5 / 0.5",
        "distillation 2 / 0.4",
    ),
    "Depth loss against RGB loss (1 is the first row)": ("10% of the pixels", "depth weight 0.3", "depth weight 3"),
}


@dataclass
class ClaimsConfig:
    """
    Args:
        model: the trained pipeline that (a), (c) over steps and (d) are measured on.
        base: the text-to-image pipeline from which the compared runs start.
        seeds: of the compared runs; tables give the mean and the range over them.
        training: settings of every compared run besides its own.
        validation_data: the held-out scenes.
        scenes: how many of them image -> depth of each model is measured on.
        curve_scenes: the same, for the curves over steps and ensembles.
        prompts: how many of their captions and depth maps the tasks that make images are measured on.
        image_steps: Euler steps of these tasks.
        sampling_steps, ensembles: of image -> depth, to compare.
        joint_log2_alpha: trajectories of joint generation to compare.
        strengths: log2_alpha of depth -> image to compare, besides following it rigidly.
    """

    model: str = "mf_diffusers/embedded/model"
    base: str = "finetune/embedded_base"
    output: str = "outputs/claims"
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    training: list[str] = field(default_factory=list)
    validation_data: dict = field(
        default_factory=lambda: {"kind": "scenes", "split": "validation", "height": 64, "width": 64}
    )
    scenes: int = 500
    curve_scenes: int = 100
    prompts: int = 50
    image_steps: int = 25
    sampling_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 25, 50])
    ensembles: list[int] = field(default_factory=lambda: [1, 4, 10])
    joint_log2_alpha: list[float] = field(default_factory=lambda: [-5, -2.5, 0, 2.5, 5])
    strengths: list[float] = field(default_factory=lambda: [-5, -8, -11, -14])


def train(config: ClaimsConfig, name: str, seed: int) -> Path:
    """The pipeline of a run, trained unless it is there."""
    folder = Path(config.output) / "runs" / "".join(c if c.isalnum() else "-" for c in name) / f"seed-{seed}"
    if not (folder / "pipeline").is_dir():
        own = [setting.format(output=config.output) for setting in RUNS[name]]
        settings = [f"base={config.base}", *config.training, *own, f"trainer.seed={seed}", f"trainer.output={folder}"]
        print(f"training {name}, seed {seed}", flush=True)
        run_script("post_train.py", "--config", CONFIGS / "embedded.yaml", *settings)
    return folder / "pipeline"


def make_random_base(config: ClaimsConfig) -> None:
    """The base with a transformer that has not been trained; text encoder and VAE stay."""
    folder = Path(config.output) / "random_base"
    if not folder.is_dir():
        base = Flux2KleinPipeline.from_pretrained(config.base)
        torch.manual_seed(0)
        base.transformer = Flux2Transformer2DModel.from_config(base.transformer.config)
        save_whole(base, folder)


def untrained(config: ClaimsConfig) -> ModalityForcingPipeline:
    """The embedded architecture before post-training."""
    torch.manual_seed(0)
    trained = load_pipeline(config.model)
    names = ("text_encoder_out_layers", "max_sequence_length", "default_sample_size")
    pipe = ModalityForcingPipeline.from_base(
        Flux2KleinPipeline.from_pretrained(config.base),
        num_depth_decoder_layers=trained.transformer.config.num_depth_decoder_layers,
        **{name: getattr(trained.config, name) for name in names},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compared(pipe: ModalityForcingPipeline, base: Flux2KleinPipeline, source: Source, count: int) -> dict[str, float]:
    """What is compared of a run."""
    errors = in_one_and_four_steps(pipe, source, count)
    return errors | drift(pipe.to(torch.float32), base, source, min(100, count))


def constant_depth(source: Source, count: int) -> dict[str, float]:
    """What the best constant of each scene scores: the alignment of a constant chooses it."""
    truths = [as_depth_map(source[i]["depth"]) for i in range(count)]
    constants = [align_affine_robust(np.ones_like(truth), truth).apply(np.ones_like(truth)) for truth in truths]
    return mean_of(depth_metrics(constant, truth) for constant, truth in zip(constants, truths))


@torch.no_grad()
def drift(
    pipe: ModalityForcingPipeline, base: Flux2KleinPipeline, source: Source, count: int = 100
) -> dict[str, float]:
    """How far the RGB velocity moved from the base's: ||v - v_base||^2 / ||v_base||^2, depth being pure noise."""
    samples = [source[i] for i in range(count)]
    latents = image_to_tokens(pipe.vae, torch.stack([sample["image"] for sample in samples]))
    prompt_embeds, _ = pipe.encode_prompt([sample["caption"] for sample in samples])
    patch_size = pipe.depth_processor.config.patch_size
    height, width = samples[0]["image"].shape[-2:]
    grid = {"rows": height // patch_size, "columns": width // patch_size}
    generator = torch.Generator().manual_seed(0)
    depth_noise = torch.randn(count, 1, height, width, generator=generator)
    moved, size = 0.0, 0.0
    for level in (0.2, 0.4, 0.6, 0.8, 1.0):
        timestep = torch.full((count,), level)
        inputs = {
            "hidden_states": add_noise(latents, torch.randn(latents.shape, generator=generator), timestep),
            "encoder_hidden_states": prompt_embeds,
            "timestep": timestep,
            "img_ids": position_ids(**grid),
            "txt_ids": position_ids(length=prompt_embeds.shape[1]),
            "return_dict": False,
        }
        velocity, _ = pipe.transformer(
            **inputs,
            depth_hidden_states=pipe.depth_processor.patchify(depth_noise),
            depth_timestep=torch.ones(count),
            depth_ids=position_ids(time=1, **grid),
        )
        base_velocity = base.transformer(**inputs)[0]
        moved += (velocity - base_velocity).square().sum().item()
        size += base_velocity.square().sum().item()
    return {"drift": moved / size}


def measure(config: ClaimsConfig) -> dict[str, dict[str, float]]:
    """Everything of the tables and figures."""
    source = build_source(config.validation_data)
    measured = Measurements(Path(config.output) / "claims.json")
    measured("constant depth", lambda: constant_depth(source, config.scenes))
    base = Flux2KleinPipeline.from_pretrained(config.base)
    measured("untrained", lambda: compared(untrained(config), base, source, config.scenes))
    measured("embedded model", lambda: compared(load_pipeline(config.model), base, source, config.scenes))
    pipe = load_pipeline(config.model)
    for steps in config.sampling_steps:
        measured(f"steps {steps}", lambda n=steps: image_to_depth(pipe, source, config.curve_scenes, steps=n))
    for size in config.ensembles:
        measured(
            f"ensemble {size}",
            lambda n=size: image_to_depth(pipe, source, config.curve_scenes, ensemble_size=n, batch_size=25),
        )
    tasks = ImageTasks(pipe, source, config.prompts, config.image_steps)
    for alpha in config.joint_log2_alpha:
        measured(f"joint {alpha:g}", lambda a=alpha: tasks.joint(a))
    for alpha in [*config.strengths, None]:
        name = "rigidly" if alpha is None else f"{alpha:g}"
        measured(f"depth followed {name}", lambda a=alpha: tasks.following(a))
    measured("depth not given", tasks.not_following)

    make_random_base(config)
    for seed in config.seeds:
        for name in RUNS:
            measured(
                f"{name}, seed {seed}",
                lambda n=name, s=seed: compared(load_pipeline(train(config, n, s)), base, source, config.scenes),
            )
    return measured.numbers


def write_tables(numbers: dict[str, dict[str, float]], config: ClaimsConfig) -> str:
    """Markdown: what was measured, in percent; ± is half the range over seeds."""
    lines = []
    for title, names in TABLES.items():
        lines += [f"**{title}**", "", "| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
        for name in names:
            cells = [table_cell(over_seeds(numbers, name, metric, config.seeds)) for metric in COLUMNS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    curves = {
        "(c) Image to depth: Euler steps, then samples of an ensemble": ("steps ", "ensemble "),
        "(d) Joint generation, over log2_alpha: its depth against image to depth of its image": ("joint ",),
        "(d) Depth to image, over log2_alpha: depth seen in the image against the given one": ("depth ",),
    }
    for title, prefixes in curves.items():
        lines += [f"**{title}**", "", "| | AbsRel % | delta1 % |", "|---|---|---|"]
        for name, row in numbers.items():
            if name.startswith(prefixes) and "seed" not in name:
                lines.append(f"| {name} | {100 * row['abs_rel']:.2f} | {100 * row['delta1']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def draw_figure(numbers: dict[str, dict[str, float]], config: ClaimsConfig) -> Figure:
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)

    def bars(axis, title, names, metric="abs_rel"):
        values = [[100 * v for v in over_seeds(numbers, name, metric, config.seeds)] for name in names]
        axis.bar(range(len(names)), [np.mean(v) for v in values], color="#7aa6c2")
        for position, points in enumerate(values):
            axis.plot([position] * len(points), points, "k.", markersize=5)
        axis.set_xticks(range(len(names)), [name.replace(" of the pixels", "") for name in names], fontsize=8)
        axis.set_title(title, fontsize=10)

    def curve(axis, title, prefix, settings, label):
        axis.plot(
            settings, [100 * numbers[f"{prefix} {setting:g}"]["abs_rel"] for setting in settings], "o-", label=label
        )
        axis.set_title(title, fontsize=10)

    tables = list(TABLES.values())
    bars(axes[0, 0], "(b) AbsRel %: valid depth pixels in training", tables[1])
    bars(axes[0, 1], "(c) AbsRel %: text-to-image pre-training", tables[2])
    bars(axes[0, 2], "(e) drift % from the base, distillation high / low", tables[3], "drift")
    axes[0, 2].set_xticks(range(4), ["0.5 / 0.1", *(name.removeprefix("distillation ") for name in tables[3][1:])])
    curve(axes[1, 0], "Image to depth, AbsRel %", "steps", config.sampling_steps, "Euler steps, one sample")
    curve(axes[1, 0], "Image to depth, AbsRel %", "ensemble", config.ensembles, "samples of an ensemble, 4 steps")
    axes[1, 0].set_xscale("log")
    axes[1, 0].legend(fontsize=8)
    curve(axes[1, 1], "(d) Joint: AbsRel % over log2_alpha", "joint", config.joint_log2_alpha, None)
    curve(axes[1, 2], "(d) Depth to image: AbsRel % over log2_alpha", "depth followed", config.strengths, "given")
    for name, style in {"depth followed rigidly": "--", "depth not given": ":"}.items():
        axes[1, 2].axhline(100 * numbers[name]["abs_rel"], linestyle=style, color="gray", label=name)
    axes[1, 2].legend(fontsize=8)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    name = "claims_quick.yaml" if take_flag("--quick") else "claims.yaml"
    config = load_config(ClaimsConfig, ["--config", str(CONFIGS / name), *sys.argv[1:]])
    for what, remedy in {"model": "train it", "base": "train it with finetune/pretrain.py"}.items():
        if not Path(getattr(config, what)).is_dir():
            raise SystemExit(f"error: no pipeline at {what}={getattr(config, what)}: {remedy}, or name another")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = measure(config)
    publish(folder / "claims", write_tables(numbers, config), draw_figure(numbers, config))


if __name__ == "__main__":
    with errors_as_lines():
        main()
