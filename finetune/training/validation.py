"""What a model in training is worth on held-out samples: losses by noise level, depth errors, pictures of the tasks.

Noise depends on the index of the sample alone, so that one validation compares with the next.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import torch

from finetune.data.batches import fit
from finetune.data.cache import CacheConfig
from finetune.data.encoding import EncodedBatch, Encoder
from finetune.data.sources import ReadReport, Source
from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.alignment import align_affine_robust
from mf_diffusers.depth_io import as_depth_map
from mf_diffusers.evaluation.metrics import depth_metrics, mean_metrics
from mf_diffusers.modality_forcing.objective import draw_noise, modality_forcing_loss
from mf_diffusers.visualization import colorize_depth, contact_sheet


LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels at which losses are measured


def read_batches(
    source: Source, count: int, batch_size: int, report: ReadReport
) -> Iterator[tuple[list[int], list[dict]]]:
    """The first `count` samples of a source in batches of one size, with their indices."""
    groups = defaultdict(list)
    for index in range(count):
        sample = source.read([index], report)[0]
        size = sample["image"].shape
        groups[size].append((index, sample))
        if len(groups[size]) == batch_size:
            yield tuple(zip(*groups.pop(size)))
    yield from (tuple(zip(*group)) for group in groups.values())


def depth_rows(
    pipe: ModalityForcingPipeline, indices: list[int], samples: list[dict[str, Any]], steps: int = 4, **kwargs
) -> list[dict[str, float]]:
    """Metrics of image -> depth, affine-aligned, of each sample of a batch that has finite depth."""
    depths = pipe(
        image=torch.stack([sample["image"] for sample in samples]),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(index) for index in indices],
        output_type="np",
        **kwargs,
    ).depth
    truths = [as_depth_map(sample["depth"]) for sample in samples]
    return [
        depth_metrics(align_affine_robust(depth, truth).apply(depth), truth)
        for depth, truth in zip(depths, truths)
        if truth.any()
    ]


def image_to_depth_metrics(
    pipe: ModalityForcingPipeline, source: Source, count: int, batch_size: int = 50, **kwargs
) -> dict[str, float]:
    """Mean AbsRel, delta1, ... of image -> depth over the first `count` samples of a source; see `depth_rows`."""
    batches = read_batches(source, count, batch_size, ReadReport())
    return mean_metrics([row for batch in batches for row in depth_rows(pipe, *batch, **kwargs)])


@torch.no_grad()
def level_losses(
    losses_at: Callable[[EncodedBatch, list[torch.Generator], float], dict[str, torch.Tensor]],
    encoder: Encoder,
    cache: CacheConfig,
    indices: list[int],
    samples: list[dict[str, Any]],
) -> dict[tuple[str, float], list[float]]:
    """Losses of a batch of samples at every one of `LEVELS`, worked on at the sizes of `cache`.

    Args:
        losses_at: a batch, a generator for each sample and a noise level -> losses by name, of each sample that counts.
    """
    size = cache.size_of(*samples[0]["image"].shape[-2:], encoder.token_size)
    samples = [fit(sample, size) for sample in samples]
    images, depths = (torch.stack([sample[name] for sample in samples]) for name in ("image", "depth"))
    batch, found = encoder(images, depths, [sample["caption"] for sample in samples]), {}
    for level in LEVELS:
        generators = [torch.Generator().manual_seed(index) for index in indices]
        for name, values in losses_at(batch, generators, level).items():
            found[name, level] = values.tolist()
    return found


def log_validation(trainer, losses: dict[tuple[str, float], list[float]], metrics: dict[str, float]) -> None:
    """Means of losses by name and level, and depth metrics: into the logs, and on the terminal as a line."""
    means = {key: float(np.mean(values)) for key, values in losses.items() if values}
    values = metrics | {f"{name}_loss_at_{level}": mean for (name, level), mean in means.items()}
    trainer.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=trainer.step)
    shown = [f"AbsRel {metrics['abs_rel']:.2%}", f"delta1 {metrics['delta1']:.2%}"] if metrics else []
    shown.append("losses at t = " + " ".join(map(str, LEVELS)))
    for name in dict.fromkeys(name for name, _ in means):
        shown.append(" ".join([name, *(f"{means[name, level]:.4g}" for level in LEVELS)]))
    if trainer.accelerator.is_main_process:
        trainer.progress_bar.write(f"step {trainer.step}: {', '.join(shown)}")


def picture_grid(
    pipe: ModalityForcingPipeline, source: Source, size: tuple[int, int], count: int = 6, steps: int = 20
) -> PIL.Image.Image:
    """Held-out samples at a (height, width), and what the three tasks make of them."""
    batch = [fit(sample, size) for sample in source.read(list(range(count)), ReadReport())]
    prompts = [sample["caption"] for sample in batch]
    images, truth = (torch.stack([sample[name] for sample in batch]) for name in ("image", "depth"))

    with_depth = [i for i in range(count) if as_depth_map(truth[i]).any()]

    def generators(chosen=range(count)):
        return [torch.Generator().manual_seed(i) for i in chosen]

    joint = pipe(prompts, height=size[0], width=size[1], num_inference_steps=steps, generator=generators())
    estimated = pipe(image=images, num_inference_steps=4, generator=generators())
    from_depth = {}
    if with_depth:
        chosen, depth = [prompts[i] for i in with_depth], truth[with_depth]
        made = pipe(chosen, depth=depth, num_inference_steps=steps, generator=generators(with_depth))
        from_depth = dict(zip(with_depth, made.images))
    rows = {
        "image": list(255 * images.permute(0, 2, 3, 1).numpy()),
        "true depth": list(colorize_depth(truth[:, 0].numpy())),
        "depth from the image": list(colorize_depth(estimated.depth, estimated.depth_mask)),
        "image from text": joint.images,
        "depth with it": list(colorize_depth(joint.depth, joint.depth_mask)),
        "image from depth": [from_depth.get(i) for i in range(count)],
    }
    pictures = [
        [PIL.Image.fromarray(np.uint8(np.round(p))) if isinstance(p, np.ndarray) else p for p in row]
        for row in rows.values()
    ]
    return contact_sheet(pictures, row_labels=list(rows), column_labels=prompts, cell=160)


def validate(pipe: ModalityForcingPipeline, source: Source, trainer, encoder: Encoder, config) -> None:
    """Logs losses by level, both modalities at the same one, and depth metrics; writes the picture grid into the run's
    folder. `config` is a `PostTrainConfig`."""
    if not trainer.validates:
        return

    def losses_at(batch, generators, level):
        has_depth = batch.valid.flatten(1).any(dim=1)
        draw = draw_noise(
            config.objective, batch.latents.shape[1:], batch.depth.shape[1:], has_depth.tolist(), generators
        )
        draw.timestep = draw.depth_timestep = torch.full((len(generators),), level)
        inputs = (x.to(trainer.device) for x in (*batch[:4], draw))
        losses = modality_forcing_loss(pipe.transformer, *inputs, config.objective, pipe.depth_processor)
        return {"rgb": losses.rgb, "depth": losses.depth[has_depth]}

    pipe.transformer.eval()
    report, found, rows = ReadReport(), defaultdict(list), []
    for batch in read_batches(source, config.validation_samples, trainer.config.micro_batch_size, report):
        for key, values in level_losses(losses_at, encoder, config.cache, *batch).items():
            found[key] += values
        rows += depth_rows(pipe, *batch)
    size = config.cache.size_of(*source.size(0), encoder.token_size)
    sheet = picture_grid(pipe, source, size)
    if trainer.accelerator.is_main_process:
        sheet.save(trainer.folder / f"validation-{trainer.step:08}.png")
    pipe.transformer.train()

    log_validation(trainer, found, mean_metrics(rows) if rows else {})
    if report.failures and trainer.accelerator.is_main_process:
        trainer.progress_bar.write(str(report))
