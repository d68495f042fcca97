"""Training samples as the model sees them, encoded once by the frozen VAE and text encoder and kept on disk."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from finetune.batches import fit
from finetune.data import ReadReport, build_source
from finetune.sparsify import SPARSIFIERS
from mf_diffusers.files import atomic_write
from mf_diffusers.modality_forcing.image_processor import processing_size
from mf_diffusers.modality_forcing.latent_tokens import image_to_tokens


SHARD = 256


@dataclass
class CacheConfig:
    """
    Args:
        folder: where caches lie; each in a folder named by what went into it.
        samples: how many samples of the source to encode.
        pixels: area near which they are worked on, at their own aspect ratio.
        text: whether to keep text features too (not when the text encoder is in training).
        depth_density: share of the pixels whose depth is kept, thinned as `depth_pattern` (finetune/sparsify.py) says.
    """

    folder: str = "outputs/cache"
    samples: int = 1000
    pixels: int = 512 * 512
    text: bool = True
    depth_density: float = 1.0
    depth_pattern: str = "random"


class EncodedSamples(torch.utils.data.Dataset):
    """
    Encoded samples on disk, in shards that are written whole or not at all: an interrupted build goes on where it was.

    An item is a dict: `latents` (N, C) float32; `depth` (1, H, W) contracted, 0 where missing; `valid` (1, H, W) bool;
    `caption`; and with text `prompt_embeds` (L, D).
    """

    def __init__(self, folder: Path, samples: int):
        self.folder, self.samples = folder, samples
        self.open_shards: dict[int, tuple] = {}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict:
        number, position = divmod(index, SHARD)
        if number not in self.open_shards:
            tensors = safe_open(shard_path(self.folder, number), "pt")
            self.open_shards[number] = tensors, json.loads(tensors.metadata()["captions"])
        tensors, captions = self.open_shards[number]
        names = {"latents", "depth", "valid", "prompt_embeds"} & {key.split(".")[0] for key in tensors.keys()}  # noqa: SIM118
        item = {name: tensors.get_tensor(f"{name}.{position}") for name in names}
        return item | {"latents": item["latents"].float(), "caption": captions[position]}


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def encode_samples(
    config: CacheConfig, source_config, pipe_config: dict, vae, depth_processor, encode_text=None
) -> EncodedSamples:
    """
    Encodes the first `config.samples` of a source, or goes on with a build that was interrupted.

    Args:
        source_config: settings of the source (finetune/data.py).
        pipe_config: what else the encoded samples depend on, of the text features for example. The cache is named by
            both and by the weights of the VAE.
        encode_text: prompts -> features (B, L, D); needed when `config.text`.

    Raises:
        TooManyUnreadableError: more than 1% of the samples could not be read. Fewer are replaced, and listed.
    """
    content = json.dumps(
        [source_config, asdict(config) | {"folder": ""}, pipe_config, weights_hash(vae)], sort_keys=True, default=str
    )
    folder = Path(config.folder) / hashlib.sha256(content.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "content.json").write_text(content)
    source, report = build_source(source_config), ReadReport()
    missing = [s for s in range(0, config.samples, SHARD) if not shard_path(folder, s // SHARD).is_file()]
    for start in tqdm(missing, desc="encoding samples", unit="shard", disable=not missing):
        tensors, captions = {}, []
        indices = list(range(start, min(start + SHARD, config.samples)))
        for position, (index, sample) in enumerate(zip(indices, source.read(indices, report))):
            size = processing_size(*sample["image"].shape[-2:], config.pixels, depth_processor.config.patch_size)
            sample = fit(sample, size)
            depth = sample["depth"]
            if config.depth_density < 1:
                generator = torch.Generator().manual_seed(index)
                depth = depth * SPARSIFIERS[config.depth_pattern](depth, config.depth_density, generator)
            depth, valid, _ = depth_processor.normalize(depth[None])
            with torch.no_grad():
                latents = image_to_tokens(vae, sample["image"][None].to(vae.device))[0]
                tensors[f"latents.{position}"] = latents.cpu().contiguous()
                if config.text:
                    tensors[f"prompt_embeds.{position}"] = encode_text([sample["caption"]])[0].cpu()
            tensors |= {f"depth.{position}": depth[0], f"valid.{position}": valid[0]}
            captions.append(sample["caption"])
        with atomic_write(shard_path(folder, start // SHARD)) as temporary:
            save_file(tensors, temporary, {"captions": json.dumps(captions)})
    if report.failures:
        print(report)
    return EncodedSamples(folder, config.samples)


def weights_hash(module: torch.nn.Module) -> str:
    """A hash of all weights of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
