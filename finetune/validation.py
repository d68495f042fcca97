"""What a model in training is worth: depth errors on held-out samples, and pictures of the three tasks."""

import numpy as np
import PIL.Image
import torch

from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.evaluation.alignment import align_affine_robust
from mf_diffusers.evaluation.metrics import depth_metrics, mean_metrics
from mf_diffusers.visualization import colorize_depth, contact_sheet


def image_to_depth_metrics(
    pipe: ModalityForcingPipeline, source, count: int, batch_size: int = 50, steps: int = 4, **kwargs
) -> dict[str, float]:
    """Mean AbsRel, delta1, ... of image -> depth over the first `count` samples of a source, affine-aligned."""
    rows = []
    for start in range(0, count, batch_size):
        batch = [source[i] for i in range(start, min(start + batch_size, count))]
        depths = pipe(
            image=torch.stack([sample["image"] for sample in batch]),
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
            output_type="np",
            **kwargs,
        ).depth
        for sample, depth in zip(batch, depths):
            truth = sample["depth"][0].numpy()
            rows.append(depth_metrics(align_affine_robust(depth, truth).apply(depth), truth))
    return mean_metrics(rows)


def picture_grid(pipe: ModalityForcingPipeline, source, count: int = 6, steps: int = 20) -> PIL.Image.Image:
    """Held-out samples and what the three tasks make of them."""
    batch = [source[i] for i in range(count)]
    prompts = [sample["caption"] for sample in batch]
    truth = torch.stack([sample["depth"] for sample in batch])

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(count)]

    images = torch.stack([sample["image"] for sample in batch])
    joint = pipe(
        prompts, height=truth.shape[-2], width=truth.shape[-1], num_inference_steps=steps, generator=generators()
    )
    estimated = pipe(image=images, num_inference_steps=4, generator=generators())
    from_depth = pipe(prompts, depth=truth, num_inference_steps=steps, generator=generators())
    rows = {
        "image": list(255 * images.permute(0, 2, 3, 1).numpy()),
        "true depth": list(colorize_depth(truth[:, 0].numpy())),
        "depth from the image": list(colorize_depth(estimated.depth, estimated.depth_mask)),
        "image from text": joint.images,
        "depth with it": list(colorize_depth(joint.depth, joint.depth_mask)),
        "image from depth": from_depth.images,
    }
    pictures = [
        [p if isinstance(p, PIL.Image.Image) else PIL.Image.fromarray(np.uint8(np.round(p))) for p in row]
        for row in rows.values()
    ]
    return contact_sheet(pictures, row_labels=list(rows), column_labels=prompts, cell=160)


def validate(pipe: ModalityForcingPipeline, source, trainer, count: int = 64) -> dict[str, float]:
    """Logs depth metrics of held-out samples and writes the picture grid into the run's folder."""
    if not trainer.accelerator.is_main_process:
        return {}
    pipe.transformer.eval()
    metrics = image_to_depth_metrics(pipe, source, count)
    trainer.accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=trainer.step)
    trainer.progress_bar.write(
        f"step {trainer.step}: AbsRel {100 * metrics['abs_rel']:.2f} %, delta1 {100 * metrics['delta1']:.2f} %"
    )
    picture_grid(pipe, source).save(trainer.folder / f"validation-{trainer.step:08}.png")
    pipe.transformer.train()
    return metrics
