import json

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TINY_TRANSFORMER, make_pipeline, randomize

from mf_diffusers import DepthProcessor, ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.adapter import load_adapter, save_adapter
from mf_diffusers.modality_forcing.backbones import BACKBONES


BASE = {name: value for name, value in TINY_TRANSFORMER.items() if "depth" not in name} | {"guidance_embeds": False}


def graft(seed=0, **options):
    torch.manual_seed(seed)
    base = Flux2Transformer2DModel(**BASE | options)
    return ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16, num_depth_decoder_layers=1)


def trained(lora: bool):
    """A graft whose added weights have all moved, as training would move them."""
    model = graft()
    if lora:
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=BACKBONES["flux2"].lora_targets))
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


def grafted(dtype=torch.float32, **pipeline_config):
    """A pipeline whose transformer is `graft()`, as `from_base` makes it."""
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.register_modules(transformer=graft().eval().to(dtype))
    pipe.register_to_config(**pipeline_config)
    return pipe


@pytest.fixture
def file(tmp_path):
    """What training wrote, with settings that are nobody's defaults."""
    pipe = grafted(default_sample_size=16, max_sequence_length=32)
    pipe.register_modules(transformer=trained(lora=True), depth_processor=DepthProcessor(4, infinite_depth=True))
    pipe.save_adapter(tmp_path / "pipeline.adapter.safetensors", base="tiny")
    return tmp_path / "pipeline.adapter.safetensors"


def assert_predicts(pipe, expected, atol=1e-5):
    output = predict(pipe.transformer)
    torch.testing.assert_close(output.sample, expected.sample, atol=atol, rtol=0)
    torch.testing.assert_close(output.depth_sample, expected.depth_sample, atol=atol, rtol=0)


@pytest.mark.parametrize("merge", [False, True])
def test_a_pipeline_with_an_adapter_is_the_trained_pipeline(file, merge):
    pipe = grafted()
    pipe.load_adapter(file, merge=merge)
    assert_predicts(pipe, predict(trained(lora=True)))
    assert (pipe.config.default_sample_size, pipe.config.max_sequence_length) == (16, 32)
    assert pipe.depth_processor.config.infinite_depth
    assert bool(getattr(pipe.transformer, "peft_config", None)) != merge


def test_the_weight_is_that_of_the_lora(file):
    pipe = grafted()
    pipe.load_adapter(file, weight=0)
    without = trained(lora=True)
    without.unload_lora()
    assert_predicts(pipe, predict(without))
    pipe.set_adapters("modality_forcing", 1.0)
    assert_predicts(pipe, predict(trained(lora=True)))


def test_unloading_brings_back_what_was_there(file):
    pipe = grafted()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    for _ in range(2):  # the second takes the place of the first
        pipe.load_adapter(file)
    pipe.unload_adapter()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (pipe.config.default_sample_size, pipe.config.max_sequence_length) == (32, 64)
    assert not pipe.depth_processor.config.infinite_depth


def make_lora(layer="single_transformer_blocks.0.attn.to_out"):
    generator = torch.Generator().manual_seed(4)
    return {
        f"{layer}.lora_A.weight": torch.randn(2, 128, generator=generator),
        f"{layer}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }


def test_loras_come_and_go_beside_an_adapter(file):
    expected = trained(lora=True)
    style = make_lora()
    with torch.no_grad():
        weight = expected.single_transformer_blocks[0].attn.to_out.base_layer.weight
        weight += (
            style["single_transformer_blocks.0.attn.to_out.lora_B.weight"]
            @ (style["single_transformer_blocks.0.attn.to_out.lora_A.weight"])
        )
    both, alone = predict(expected), predict(trained(lora=True))

    pipe = grafted()
    pipe.load_adapter(file)
    pipe.load_lora_weights(style, adapter_name="style")
    assert_predicts(pipe, both, atol=1e-4)
    pipe.unload_lora_weights()
    assert_predicts(pipe, alone)
    pipe.unload_adapter()

    pipe.load_lora_weights(style, adapter_name="style")
    pipe.load_adapter(file)
    assert_predicts(pipe, both, atol=1e-4)
    pipe.unload_adapter()
    assert pipe.get_active_adapters() == ["style"]
    with pytest.raises(ValueError, match=r"LoRAs \['style'\] are in use: merge the adapter first"):
        pipe.load_adapter(file, merge=True)


def test_from_base_with_an_adapter(file):
    pipe = make_pipeline()
    torch.manual_seed(0)
    pipe.register_modules(transformer=Flux2Transformer2DModel(**BASE))
    model = ModalityForcingPipeline.from_base(pipe, adapter=file)
    assert_predicts(model, predict(trained(lora=True)))
    assert model.config.default_sample_size == 16
    assert not getattr(model.transformer, "peft_config", None)


def test_the_base_is_known_in_another_dtype_but_not_once_it_is_trained(file):
    pipe = grafted(dtype=torch.bfloat16)
    pipe.load_adapter(file)
    trained_on = grafted()
    with torch.no_grad():
        trained_on.transformer.single_transformer_blocks[-1].attn.to_out.weight *= 1.01
    with pytest.raises(ValueError, match="was trained on tiny, which is not the base"):
        trained_on.load_adapter(file)


def test_broken_adapters_leave_the_pipeline_as_it_was(file):
    pipe = grafted()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors, wider = load_file(file), torch.zeros(16, 64)
    unknown = metadata | {"settings": json.dumps({"depth_processor": {"farther": 2}})}
    for more, notes, message in (
        ({"depth_head.proj_out.weight": wider}, metadata, r"different depth modules, for one depth_head\.proj_out"),
        ({"transformer.x.lora_A.weight": wider}, metadata, r"no place in this transformer: x\.lora_A"),
        ({}, unknown, r"settings that this version does not know: depth_processor\.farther"),
    ):
        save_file(tensors | more, file, notes)
        with pytest.raises(ValueError, match=message):
            pipe.load_adapter(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        pipe.load_adapter(file)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_each_loader_names_the_other(file, tmp_path):
    pipe = grafted()
    with pytest.raises(ValueError, match="is an adapter that training wrote: `load_adapter` loads it"):
        pipe.load_lora_weights(file)
    save_file(make_lora(), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="a LoRA of another program goes to `load_lora_weights`"):
        pipe.load_adapter(tmp_path / "lora.safetensors")
