"""The models that the settings of a run name, as far as their configs say: nothing here needs weights."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from omegaconf import OmegaConf

from mf_diffusers.modality_forcing.backbones import BACKBONES, family_of
from mf_diffusers.precision import DTYPES


TEXT_ENCODER_PARAMETERS = {  # of those that are known without their files
    "google/umt5-xxl": 5_680_910_336,
    "black-forest-labs/FLUX.2-klein-base-4B": 4_022_468_096,  # Qwen3-4B
    "black-forest-labs/FLUX.2-klein-base-9B": 8_190_735_360,  # Qwen3-8B
    "Tongyi-MAI/Z-Image": 4_022_468_096,  # Qwen3-4B
}
FLUX2_TOKEN_SIZE = 16  # pixels along a token's side: 8 of the VAE's, in cells of 2x2
FLUX2_CHANNELS = 128  # values of such a token


def read_base(config) -> tuple[dict, int]:
    """Constructor arguments of the transformer that a `PostTrainConfig` begins with, and the size of its tokens."""
    if config.base_config is not None:
        return config.base_config, FLUX2_TOKEN_SIZE
    base = config.base
    try:
        transformer = BACKBONES[config.architecture].transformer_class.load_config(base, subfolder="transformer")
        check_architecture(config, transformer["_class_name"])
        return {k: v for k, v in transformer.items() if k[0] != "_"}, read_token_size(base, transformer)
    except OSError as error:
        if config.base_settings is None:
            raise SystemExit(
                f"error: no base at {base}: give its folder, or its sizes as base_config\n{error}"
            ) from error
    settings = read_base_settings(config.base_settings)
    return settings["transformer"], read_token_size(settings["vae"], settings["transformer"])


def read_base_settings(path: str) -> dict:
    """The settings file of a base's pre-training."""
    try:
        settings = OmegaConf.to_object(OmegaConf.load(path))
        missing = [name for name in ("vae", "transformer") if name not in settings]
    except OSError as error:
        raise SystemExit(f"error: base_settings {path} cannot be read: {error}") from error
    if missing:
        raise SystemExit(f"error: base_settings {path} is no settings file of a pre-training: it has no {missing[0]}")
    return settings


def with_text_of_base(config):
    """A `PostTrainConfig` with the text settings of its base, where that has its own: a `ModalityForcingPipeline`, or,
    before it is there, the settings of its pre-training."""
    if config.base_config is not None:
        return config
    try:
        own = DiffusionPipeline.load_config(config.base)
    except OSError:
        is_known = BACKBONES[config.architecture].base_pipeline_class is None and config.base_settings is not None
        own = read_base_settings(config.base_settings) if is_known else {}
    names = ("text_encoder_out_layers", "max_sequence_length")
    return replace(config, **{name: own[name] for name in names if name in own})


def check_architecture(config, class_name: str) -> None:
    """Stops where a base's transformer, of this class, is not of the architecture of a `PostTrainConfig`."""
    found = family_of(class_name)
    if found != config.architecture:
        raise SystemExit(f"error: {config.base} is of architecture {found}: set it so")


def read_token_size(vae: str, transformer: dict) -> int:
    """Pixels along a token's side, of the VAE of a `PretrainConfig`; FLUX.2's is known without its files."""
    if not Path(vae).is_dir() and transformer.get("in_channels") == FLUX2_CHANNELS:
        return FLUX2_TOKEN_SIZE
    subfolder = None if (Path(vae) / "config.json").is_file() else "vae"
    try:
        return 2 ** len(AutoencoderKLFlux2.load_config(vae, subfolder=subfolder)["block_out_channels"])
    except OSError as error:
        raise SystemExit(f"error: no VAE at {vae}: {error}") from error


def live_text_encoder(config, name: str | None) -> int:
    """Parameters of a frozen text encoder that stays on the device, as it does without a cache; 0 with one, and where
    the encoder's config cannot be read.

    Args:
        config: settings of either script.
        name: folder or Hub repository of the encoder, or of a pipeline with it; None: it trains along.
    """
    if config.cache.folder is not None or name is None:
        return 0
    if name in TEXT_ENCODER_PARAMETERS:
        return TEXT_ENCODER_PARAMETERS[name]
    backbone = BACKBONES[config.architecture]
    folder = Path(name, "text_encoder")
    try:
        encoder_config = backbone.text_config_class.from_pretrained(folder if folder.is_dir() else name)
    except OSError:
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in backbone.text_encoder_class(encoder_config).parameters())


def live_text_encoder_of_base(config) -> int:
    """`live_text_encoder` of a `PostTrainConfig`, by the settings of its base's pre-training before that is there."""
    if config.base_settings is None or Path(config.base).is_dir():
        return live_text_encoder(config, config.base)
    return live_text_encoder(config, read_base_settings(config.base_settings).get("pretrained_text_encoder"))


def empty_transformer(config) -> ModelMixin:
    """The grafted transformer of a `PostTrainConfig` on the meta device, in the dtype of the base."""
    base, token_size = read_base(config)
    depth = {"depth_channels": token_size**2, "num_depth_decoder_layers": config.num_depth_decoder_layers}
    depth |= config.graft
    with torch.device("meta"):
        has_depth = base.get("depth_channels") is not None  # such a base keeps its own
        model = BACKBONES[config.architecture].transformer_class(**(base if has_depth else base | depth))
        if has_depth and config.extra_depth_decoder_layers:
            model.deepen_depth_decoder(config.extra_depth_decoder_layers)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[config.base_dtype])
    return model
