import pytest
import torch
from conftest import TINY_TRANSFORMER, randomize
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file

from mf_diffusers import ModalityForcingFlux2Transformer2DModel
from mf_diffusers.modality_forcing.adapter import LORA_TARGET_MODULES, load_adapter, save_adapter


BASE = {name: value for name, value in TINY_TRANSFORMER.items() if "depth" not in name} | {"guidance_embeds": False}


def graft(seed=0, **options):
    torch.manual_seed(seed)
    base = Flux2Transformer2DModel(**BASE | options)
    return ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16, num_depth_decoder_layers=1)


def trained(lora: bool):
    """A graft whose added weights have all moved, as training would move them."""
    model = graft()
    if lora:
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=LORA_TARGET_MODULES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "depth" in name or "lora" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return randomize(model).eval()


def predict(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(6, 4)
    with torch.no_grad():
        return model(
            torch.randn(1, 6, 16, generator=generator),
            torch.randn(1, 6, 48, generator=generator),
            torch.ones(1),
            ids,
            ids,
            depth_hidden_states=torch.randn(1, 6, 16, generator=generator),
            depth_timestep=torch.ones(1),
            depth_ids=ids,
        )


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_base_with_its_adapter_is_the_trained_model(tmp_path, lora, merge):
    model = trained(lora)
    save_adapter(model, tmp_path / "adapter.safetensors", base="tiny")
    again = graft().eval()
    load_adapter(again, tmp_path / "adapter.safetensors", merge=merge)
    expected, output = predict(model), predict(again)
    assert torch.allclose(output.sample, expected.sample, atol=1e-5)
    assert torch.allclose(output.depth_sample, expected.depth_sample, atol=1e-5)
    assert any("lora" in name for name in again.state_dict()) == (lora and not merge)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(trained(lora=True), tmp_path / "adapter.safetensors", base="tiny")
    with pytest.raises(ValueError, match="was trained on tiny, which is not the base"):
        load_adapter(graft(num_single_layers=3), tmp_path / "adapter.safetensors")


def test_an_adapter_of_a_base_with_other_weights_is_refused(tmp_path):
    save_adapter(trained(lora=True), tmp_path / "adapter.safetensors", base="tiny")
    with pytest.raises(ValueError, match="was trained on tiny, which is not the base"):
        load_adapter(graft(seed=1), tmp_path / "adapter.safetensors")


def test_a_lora_on_depth_modules_is_refused(tmp_path):
    model = graft()
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["depth_q_proj"]))
    with pytest.raises(ValueError, match="depth modules train whole"):
        save_adapter(model, tmp_path / "adapter.safetensors", base="tiny")


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is no adapter"):
        load_adapter(graft(), tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match="No weights at"):
        load_adapter(graft(), tmp_path / "missing.safetensors")


def test_another_number_of_decoder_layers(tmp_path):
    save_adapter(trained(lora=False), tmp_path / "adapter.safetensors", base="tiny")
    torch.manual_seed(0)
    base = Flux2Transformer2DModel(**BASE)
    deeper = ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16, num_depth_decoder_layers=2)
    with pytest.raises(ValueError, match=r"for one depth_decoder_blocks\.1"):
        load_adapter(deeper, tmp_path / "adapter.safetensors")


def test_an_alpha_that_is_not_the_rank(tmp_path):
    model = graft()
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="lora_alpha = r"):
        save_adapter(model, tmp_path / "adapter.safetensors", base="tiny")
