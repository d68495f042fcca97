"""Trains a small FLUX.2-type autoencoder on procedural scenes: the image latents of the embedded toy model.

    python finetune/train_autoencoder.py --config finetune/configs/embedded_autoencoder.yaml [key=value ...]

The scenes are rendered once, into `output/pool`. What comes out is `output/vae`, a diffusers folder with the averaged
weights and with the statistics that whiten the transformer's tokens. `resume=true` continues after the last
checkpoint, to the same weights as without the interruption: all that is random in a step comes from the seed and the
number of the step.
"""

import copy
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm


sys.path.append(str(Path(__file__).resolve().parents[1]))

from finetune.config import load_config, save_config
from finetune.scenes import render_scenes
from mf_diffusers.errors import errors_as_lines
from mf_diffusers.files import atomic_write, save_whole
from mf_diffusers.modality_forcing.latent_tokens import decode_latents, image_to_tokens, tokens_to_latents
from mf_diffusers.precision import DTYPES, choose_dtype


SHARD = 500  # scenes per file of the pool: what an interruption while rendering can lose


@dataclass
class Config:
    output: str = "outputs/embedded_autoencoder"
    resume: bool = False
    seed: int = 0
    device: str = "cpu"
    precision: str = "auto"  # of the products in training: bf16, fp32, or what the device has instructions for
    # scenes
    image_size: int = 64
    train_scenes: int = 8000
    validation_scenes: int = 256
    # model
    block_out_channels: list[int] = field(default_factory=lambda: [24, 48, 96])
    layers_per_block: int = 1
    latent_channels: int = 8
    norm_num_groups: int = 4
    mid_block_add_attention: bool = False
    # loss: L1 + l2 * L2 + edges * (L1 of the gradients at three scales) + kl * (KL to the normal distribution)
    # + decorrelation * (squared correlation of the latent channels)
    l2: float = 0.5
    edges: float = 0.5
    kl: float = 1e-4
    decorrelation: float = 0.05  # whitening is per channel: where channels repeat one another, details drown in noise
    latent_noise: float = 0.05  # standard deviation of the noise the decoder must bear, in those of the latents
    # optimisation
    steps: int = 3600
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.995
    # steps between them
    validate_every: int = 400
    checkpoint_every: int = 400


# ------------------------------------------------------------------------------------------------------- scenes


def load_pool(config: Config, split: str, count: int) -> torch.Tensor:
    """Images (count, 3, H, W), uint8, of scenes 0 to count - 1; those not yet on the disk are rendered."""
    folder = Path(config.output) / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    progress = tqdm(total=count, desc=f"{split} scenes", unit=" scenes")
    for start in range(0, count, SHARD):
        stop = min(start + SHARD, count)
        path = folder / f"{split}-seed{config.seed}-{config.image_size}px-{start}-{stop}.safetensors"
        if not path.exists():
            size, parts = config.image_size, []
            for low in range(start, stop, 100):
                indices = range(low, min(low + 100, stop))
                image = render_scenes(indices, config.seed, size, size, config.device, split=split).image
                parts.append((image * 255).round().to(torch.uint8).cpu())
                progress.update(len(indices))
            with atomic_write(path) as temporary:
                save_file({"image": torch.cat(parts)}, temporary)
        shards.append(load_file(path)["image"])
        progress.update(stop - progress.n)
    progress.close()
    return torch.cat(shards)


# --------------------------------------------------------------------------------------------------------- loss


def edge_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical differences at full, half and quarter resolution."""
    error, loss = output - target, 0.0
    for _ in range(3):
        loss = loss + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return loss / 6


def training_loss(
    vae: AutoencoderKLFlux2, images: torch.Tensor, rng: torch.Generator, config: Config, dtype: torch.dtype
) -> torch.Tensor:
    """The loss of uint8 images, flipped at random; the products are in `dtype`."""
    flip = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    target = torch.where(flip, images.flip(-1), images).to(config.device) / 127.5 - 1
    with torch.autocast(torch.device(config.device).type, dtype, enabled=dtype != torch.float32):
        posterior = vae.encode(target).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # Noise in proportion to the latents: the encoder cannot escape it by making them larger.
        spread = config.latent_noise * mean.detach().std(dim=(0, 2, 3), keepdim=True)
        noise = torch.randn(mean.shape, generator=rng).to(mean.device)
        output = vae.decode(mean + noise * (logvar.exp() + spread**2).sqrt(), return_dict=False)[0].float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    correlation = torch.corrcoef(mean.transpose(0, 1).flatten(1)).tril(-1)
    loss = F.l1_loss(output, target) + config.l2 * F.mse_loss(output, target)
    loss = loss + config.edges * edge_loss(output, target) + config.kl * kl
    return loss + config.decorrelation * 2 * correlation.square().sum() / (len(correlation) * (len(correlation) - 1))


# ------------------------------------------------------------------------------------------------- measurements


@torch.no_grad()
def validate(vae: AutoencoderKLFlux2, pool: torch.Tensor, picture: Path) -> tuple[float, float]:
    """PSNR in dB (mean over the images) and L1 of images in [0, 1], through the transformer's tokens and back.

    Writes `picture`: up to 32 images, four in a row, each beside its reconstruction.
    """
    psnr, l1, pairs = [], [], []
    for images in pool.split(32):
        target = images.to(vae.device) / 255
        side = target.shape[-1] // 8
        latents = tokens_to_latents(vae, image_to_tokens(vae, target), side, side)
        output = decode_latents(vae, latents) / 2 + 0.5
        psnr.append(-10 * (output - target).square().mean(dim=(1, 2, 3)).log10())
        l1.append((output - target).abs().mean(dim=(1, 2, 3)))
        pairs.append(torch.cat([target, output], dim=3).cpu())
    pairs = torch.cat(pairs)[: min(32, len(pool) // 4 * 4)].unflatten(0, (-1, 4))
    grid = pairs.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    with atomic_write(picture) as temporary:
        Image.fromarray((grid.clamp(0, 1) * 255).round().numpy().astype(np.uint8)).save(temporary)
    return torch.cat(psnr).mean().item(), torch.cat(l1).mean().item()


@torch.no_grad()
def fit_statistics(vae: AutoencoderKLFlux2, pool: torch.Tensor) -> None:
    """Sets the mean and variance by which the tokens of the images in `pool` become white."""
    vae.bn.running_mean.zero_()
    vae.bn.running_var.fill_(1 - vae.config.batch_norm_eps)  # image_to_tokens now leaves the latents as they are
    total = square = count = 0
    for images in tqdm(pool.split(64), desc="statistics", unit=" batches"):
        tokens = image_to_tokens(vae, images.to(vae.device) / 255).double().flatten(0, 1)
        total, square, count = total + tokens.sum(0), square + tokens.square().sum(0), count + len(tokens)
    mean = total / count
    vae.bn.running_mean.copy_(mean)
    vae.bn.running_var.copy_(square / count - mean**2)


# ------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    path: Path, step: int, vae: AutoencoderKLFlux2, ema: AutoencoderKLFlux2, optimizer: torch.optim.Optimizer
) -> None:
    """`step` is the number of steps taken."""
    tensors = {f"model/{name}": tensor for name, tensor in vae.state_dict().items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in vae.named_parameters():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in optimizer.state[parameter].items()}
    with atomic_write(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"step": str(step)})


def load_checkpoint(
    path: Path, vae: AutoencoderKLFlux2, ema: AutoencoderKLFlux2, optimizer: torch.optim.Optimizer
) -> int:
    """Returns the number of steps taken."""
    tensors = load_file(path)
    for prefix, model in (("model/", vae), ("ema/", ema)):
        model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, parameter in vae.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        state = {key: tensors[f"optimizer/{name}/{key}"] for key in keys}
        optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


# ----------------------------------------------------------------------------------------------------- training


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then half a cosine to zero."""
    done = (step + 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    decay = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps)) * decay


def train(config: Config) -> list[float]:
    """Returns the loss of each step taken here."""
    if config.precision not in ("auto", *DTYPES):
        raise SystemExit(f"error: precision is auto, bf16 or fp32, not {config.precision!r}")
    dtype = choose_dtype(config.device, DTYPES.get(config.precision))
    levels = len(config.block_out_channels)
    if levels != 3 or config.image_size % 8:
        raise SystemExit("error: block_out_channels needs three levels and image_size a multiple of 8")
    if config.validation_scenes < 4:
        raise SystemExit(f"error: validation_scenes is at least 4, not {config.validation_scenes}")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.safetensors"
    if checkpoint.exists() and not config.resume:
        raise SystemExit(f"error: {checkpoint} exists: resume=true continues it, another output=... leaves it alone")
    save_config(config, output / "config.yaml")

    pool = load_pool(config, "train", config.train_scenes)
    held_out = load_pool(config, "validation", config.validation_scenes)

    torch.manual_seed(config.seed)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_add_attention,
        sample_size=config.image_size,
    ).to(config.device)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):  # starts as its skip: the whole is almost linear, and learns far faster
            torch.nn.init.zeros_(module.conv2.weight)
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=config.weight_decay)
    start = load_checkpoint(checkpoint, vae, ema, optimizer) if checkpoint.exists() else 0
    count = sum(p.numel() for p in vae.parameters())
    print(f"{count:,} parameters, products in {dtype}, steps {start} to {config.steps}", flush=True)

    losses = []
    progress = tqdm(total=config.steps * config.batch_size, initial=start * config.batch_size, unit=" samples")
    for step in range(start, config.steps):
        rng = torch.Generator().manual_seed(config.seed * 2**32 + step)
        images = pool[torch.randint(len(pool), (config.batch_size,), generator=rng)]
        loss = training_loss(vae, images, rng, config, dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in vae.parameters()], 1 - decay)

        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        progress.update(config.batch_size)
        last = step + 1 == config.steps
        if last or (step + 1) % config.checkpoint_every == 0:
            save_checkpoint(checkpoint, step + 1, vae, ema, optimizer)
        if last or (step + 1) % config.validate_every == 0:
            psnr, l1 = validate(ema, held_out, output / "validation.png")
            mean = sum(losses[-config.validate_every :]) / len(losses[-config.validate_every :])
            tqdm.write(f"step {step + 1}: loss {mean:.4f}, validation PSNR {psnr:.2f} dB, L1 {l1:.4f}")
            sys.stdout.flush()
    progress.close()

    fit_statistics(ema, pool)
    save_whole(ema, output / "vae")
    print(f"wrote {output / 'vae'}")
    return losses


if __name__ == "__main__":
    with errors_as_lines():
        train(load_config(Config))
