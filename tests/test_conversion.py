import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_TRANSFORMER, randomize

from mf_diffusers import ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.conversion import (
    TRANSFORMER_KEYS,
    convert_published_autoencoder,
    convert_published_transformer,
    export_published_transformer,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER))


@pytest.mark.parametrize(
    "options", [{}, {"depth_timestep_mixing": False}, {"guidance_embeds": True}, {"mlp_ratio": 4.0}]
)
@pytest.mark.parametrize("prefix", ["dit.", ""])
def test_round_trip(tmp_path, options, prefix):
    model = ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER | options)
    model.save_published(tmp_path / "model.safetensors", prefix=prefix)
    assert all(key.startswith(prefix) for key in load_file(tmp_path / "model.safetensors"))
    again = ModalityForcingFlux2Transformer2DModel.from_published(tmp_path / "model.safetensors")
    assert {k: v for k, v in again.config.items() if k in TINY_TRANSFORMER | options} == TINY_TRANSFORMER | options
    expected = model.state_dict()
    assert list(again.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_the_table_names_every_weight_once(model):
    names = [name for entry in TRANSFORMER_KEYS.values() for name in ((entry,) if isinstance(entry, str) else entry)]
    assert len(names) == len(set(names))
    guided = ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER, guidance_embeds=True)
    stacks = ("transformer_blocks", "single_transformer_blocks", "depth_decoder_blocks")
    first_blocks = {
        ".".join([parts[0], "N", *parts[2:]]) if parts[0] in stacks else ".".join(parts)
        for parts in (name.split(".") for name in guided.state_dict())
    }
    assert set(names) == first_blocks


@pytest.mark.parametrize(
    ("missing", "extra", "message"),
    [
        ("dit.double_blocks.1.depth_mlp.0.weight", None, r"Missing keys: double_blocks\.1\.depth_mlp\.0\.weight"),
        ("dit.cross_alpha_img", None, "Missing keys: cross_alpha_img"),
        ("dit.depth_in.weight", None, r"Missing keys: depth_in\.weight"),
        (None, "dit.double_blocks.0.lidar_attn.qkv.weight", r"Unexpected keys: double_blocks\.0\.lidar_attn\.qkv"),
        (None, "unet.weight", r"Unexpected keys: unet\.weight"),
    ],
)
def test_wrong_keys_are_named(model, missing, extra, message):
    published = export_published_transformer(model.state_dict())
    if missing:
        del published[missing]
    if extra:
        published[extra] = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        convert_published_transformer(published)


def test_a_flux2_checkpoint_without_depth_is_told_apart(model):
    published = export_published_transformer(model.state_dict())
    flux = {key: tensor for key, tensor in published.items() if "depth" not in key and "cross_alpha" not in key}
    with pytest.raises(ValueError, match=r"Missing keys: depth_in\.weight.* and \d+ more"):
        convert_published_transformer(flux)


def test_an_empty_checkpoint(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Missing keys: img_in\.weight"):
        ModalityForcingFlux2Transformer2DModel.from_published(tmp_path)


def test_adapters_must_be_merged_before_export(model):
    with pytest.raises(ValueError, match="merge adapters before exporting"):
        export_published_transformer(model.state_dict() | {"x_embedder.lora_A.default.weight": torch.zeros(1)})


def test_missing_truncated_and_foreign_files(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No weights at .*model\.safetensors"):
        ModalityForcingFlux2Transformer2DModel.from_published(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        ModalityForcingFlux2Transformer2DModel.from_published(tmp_path / "nothing.safetensors")
    path = tmp_path / "model.safetensors"
    model.save_published(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        ModalityForcingFlux2Transformer2DModel.from_published(tmp_path)
    path.write_bytes(b"\x80\x04 this is a pickle, or may be one")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        ModalityForcingFlux2Transformer2DModel.from_published(tmp_path)


def test_a_pipeline_without_its_autoencoder(model, tmp_path):
    model.save_published(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"ae_encoder\.safetensors"):
        ModalityForcingPipeline.from_published(tmp_path)
    with pytest.raises(ValueError, match=r"not the published ae_encoder\.safetensors"):
        convert_published_autoencoder(model.state_dict(), model.state_dict())


def test_a_failed_export_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model.save_published(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="lack of space"):
        monkeypatch.setattr("mf_diffusers.modality_forcing.conversion.save_file", fail_half_way)
        model.save_published(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def fail_half_way(tensors, path, metadata):
    path.write_bytes(b"half")
    raise OSError("lack of space")
