"""LoRAs of the transformer in the spellings that programs write: every file of one LoRA makes the same change."""

import json
import math

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import make_pipeline

from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.modality_forcing.lora import linear_layers


RANK = 2
# FLUX.2's layers in Black Forest Labs' names. (diffusers: queries, keys and values apart.)
BFL = {
    "img_in": ["x_embedder"],
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.1.txt_attn.qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.1.txt_attn.proj": ["transformer_blocks.1.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
    "double_blocks.1.txt_mlp.2": ["transformer_blocks.1.ff_context.linear_out"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "single_blocks.1.linear2": ["single_transformer_blocks.1.attn.to_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(autouse=True)
def without_loras(pipe):
    yield
    pipe.unload_lora_weights()
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.fixture(scope="module")
def bfl(pipe):
    """LoRA of `BFL`: its down (rank, in) and up (out, rank) factors."""
    layers, generator = linear_layers(pipe.transformer), torch.Generator().manual_seed(0)
    factors = {}
    for name, places in BFL.items():
        width_in, width_out = layers[places[0]]
        down = torch.randn(RANK, width_in, generator=generator)
        factors[name] = down, torch.randn(len(places) * width_out, RANK, generator=generator)
    return factors


@pytest.fixture(scope="module")
def diffusers(bfl):
    """The same by diffusers' names."""
    factors = {}
    for name, places in BFL.items():
        down, up = bfl[name]
        if name.startswith("final_layer"):  # (shift, scale) there, (scale, shift) in diffusers
            up = torch.cat(up.chunk(2)[::-1])
        factors |= {place: (down, part.contiguous()) for place, part in zip(places, up.chunk(len(places)))}
    return factors


@pytest.fixture(scope="module")
def expected(pipe, diffusers):
    """Weights of the layers with the LoRA in them."""
    return {name: pipe.transformer.get_submodule(name).weight + up @ down for name, (down, up) in diffusers.items()}


def spelled(factors, name="{}", down="{}.lora_A.weight", up="{}.lora_B.weight", alpha=None):
    weights = {}
    for layer, (a, b) in factors.items():
        key = name(layer) if callable(name) else name.format(layer)
        weights |= {down.format(key): a.clone(), up.format(key): b.clone()}
        if alpha is not None:
            weights |= {f"{key}.alpha": torch.tensor(float(alpha)), up.format(key): b * (RANK / alpha)}
    return weights


def underscored(prefix):
    return lambda layer: prefix + layer.replace(".", "_")


KOHYA = {"down": "{}.lora_down.weight", "up": "{}.lora_up.weight"}
OLD = {"down": "{}.lora.down.weight", "up": "{}.lora.up.weight"}
NAMED = {"down": "{}.lora_A.default.weight", "up": "{}.lora_B.default.weight"}
SPELLINGS = {  # what writes it: of which names, and how
    "diffusers": ("diffusers", {"name": "transformer.{}"}),
    "DiffSynth": ("diffusers", {}),
    "DiffSynth, with a name": ("diffusers", NAMED),
    "DiffSynth, of its pipeline": ("diffusers", {"name": "pipe.dit.{}"} | NAMED),
    "PEFT": ("diffusers", {"name": "base_model.model.{}"}),
    "PEFT, with its name": ("diffusers", {"name": "base_model.model.{}"} | NAMED),
    "PEFT around a pipeline": ("diffusers", {"name": "base_model.model.transformer.{}"}),
    "ComfyUI in diffusers' names": ("diffusers", {"name": "diffusion_model.{}"}),
    "diffusers, the old way": ("diffusers", {"name": "transformer.{}"} | OLD),
    "OneTrainer": ("diffusers", {"name": underscored("lora_transformer_"), "alpha": 1} | KOHYA),
    "LyCORIS": ("diffusers", {"name": underscored("lycoris_"), "alpha": 4} | KOHYA),
    "ai-toolkit": ("bfl", {"name": "diffusion_model.{}"}),
    "ai-toolkit, with alpha": ("bfl", {"name": "diffusion_model.{}", "alpha": 8}),
    "ComfyUI": ("bfl", {"name": "diffusion_model.{}", "alpha": 1} | KOHYA),
    "Black Forest Labs": ("bfl", {}),
    "kohya": ("bfl", {"name": underscored("lora_unet_"), "alpha": 1} | KOHYA),
    "kohya without alpha": ("bfl", {"name": underscored("lora_unet_")} | KOHYA),
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_every_spelling_makes_the_same_change(program, pipe, bfl, diffusers, expected, tmp_path):
    names, spelling = SPELLINGS[program]
    save_file(spelled({"bfl": bfl, "diffusers": diffusers}[names], **spelling), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert_changed(pipe, expected)


def assert_changed(pipe, expected):
    adapted = {name for name, module in pipe.transformer.named_modules() if hasattr(module, "base_layer")}
    assert adapted == expected.keys()
    for name, weight in expected.items():
        layer = pipe.transformer.get_submodule(name)
        changed = layer.base_layer.weight + layer.get_delta_weight(layer.active_adapters[0])
        torch.testing.assert_close(changed, weight, atol=1e-4, rtol=1e-4)


def test_what_diffusers_and_peft_write_has_its_scale(pipe, diffusers, tmp_path):
    """Both note alpha in their own way, diffusers in the file and PEFT beside it."""
    model = make_pipeline().transformer
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=[f"^{name}$" for name in diffusers])
    config.target_modules = "|".join(name.replace(".", r"\.") for name in diffusers)
    model.add_adapter(config)
    for name, (down, up) in diffusers.items():
        layer = model.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down.clone(), up.clone()
    expected = {
        name: pipe.transformer.get_submodule(name).weight + 3 * up @ down for name, (down, up) in diffusers.items()
    }
    model.save_lora_adapter(tmp_path / "diffusers")
    ModalityForcingPipeline.save_lora_weights(
        tmp_path / "pipeline",
        get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict()
        | {"target_modules": config.target_modules},
    )
    (tmp_path / "peft").mkdir()
    peft = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(peft, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6}))
    for folder in ("pipeline", "peft"):
        pipe.load_lora_weights(tmp_path / folder)
        assert_changed(pipe, expected)
        pipe.unload_lora_weights()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_every_width_of_fractions(dtype, pipe, diffusers, tmp_path):
    weights = {key: tensor.to(dtype) for key, tensor in spelled(diffusers, "transformer.{}").items()}
    save_file(weights, tmp_path / "lora.safetensors")
    expected = {}
    for name in diffusers:
        down, up = (weights[f"transformer.{name}.lora_{factor}.weight"].float() for factor in "AB")
        expected[name] = pipe.transformer.get_submodule(name).weight + up @ down
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert_changed(pipe, expected)


@pytest.mark.parametrize("text", ["{", "[1]", "null", "\0"])
@pytest.mark.parametrize("where", ["lora_adapter_metadata", "adapter_config.json"])
def test_settings_that_are_none(where, text, pipe, diffusers, tmp_path):
    metadata = {where: text} if where == "lora_adapter_metadata" else None
    save_file(spelled(diffusers, "transformer.{}"), tmp_path / "lora.safetensors", metadata)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{where} is no JSON"):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")


def test_alpha_patterns_and_rslora(pipe, diffusers, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": RANK, "lora_alpha": 3, "alpha_pattern": {"to_q": 5}, "use_rslora": True})
    )
    save_file(spelled(diffusers), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path)
    assert_changed(
        pipe,
        {
            name: pipe.transformer.get_submodule(name).base_layer.weight
            + (5 if name.endswith("to_q") else 3) / math.sqrt(RANK) * up @ down
            for name, (down, up) in diffusers.items()
        },
    )


def test_weight_merging_and_unloading(pipe, diffusers):
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(spelled(diffusers), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        change = 0.5 * diffusers[layer][1] @ diffusers[layer][0] if layer in diffusers else 0
        torch.testing.assert_close(after[name], weight + change, atol=1e-5, rtol=1e-5)
    pipe.transformer.load_state_dict(before)


def test_a_lokr_in_one_for_queries_keys_and_values(pipe):
    """diffusers fuses them in the model for it; LoRAs of the layers apart are heard again afterwards."""
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    inputs = {"output_type": "latent", "num_inference_steps": 1, "prompt": "x"}

    def made():
        return pipe(**inputs, generator=torch.Generator().manual_seed(0)).images

    expected, generator = made(), torch.Generator().manual_seed(0)
    lokr = {
        "diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1": torch.randn(8, 4, generator=generator),
        "diffusion_model.double_blocks.0.img_attn.qkv.lokr_w2": torch.randn(12, 8, generator=generator),
    }
    pipe.load_lora_weights(lokr)
    assert (made() - expected).abs().max() > 1e-4
    key = "transformer_blocks.0.attn.to_q"
    with pytest.raises(ValueError, match=f"no place in this transformer: {key}"):
        pipe.load_lora_weights({f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)})
    pipe.unload_lora_weights()
    assert pipe.transformer.state_dict().keys() == before.keys()
    assert torch.equal(made(), expected)
    with pytest.raises(ValueError, match="no place in this transformer: nowhere"):
        pipe.load_lora_weights({"transformer.nowhere.lokr_w1": torch.ones(2, 2)})


def broken(what, lora):
    """A LoRA in diffusers' names, with a fault."""
    key = "transformer.single_transformer_blocks.1.attn.to_out"
    down, up = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
    half = list(lora)[: len(lora) // 2]
    match what:
        case "half of the keys unknown":
            return {f"{key}s" if key in half else key: tensor for key, tensor in lora.items()}
        case "another model's keys":
            return {key.replace("transformer.", "transformer.layers."): w for key, w in lora.items()}
        case "a text encoder's keys too":
            return lora | {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
        case "kohya's text encoder":
            return lora | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4)}
        case "DoRA":
            return lora | {f"{key}.lora_magnitude_vector": torch.ones(32)}
        case "whole differences":
            return {f"{key}.diff": torch.ones(32, 128)}
        case "a weight of the model":
            return lora | {"transformer.x_embedder.weight": torch.ones(32, 16)}
        case "no keys":
            return {}
        case "another width":
            return {key: torch.cat([w, w], dim=int("lora_A" in key)) for key, w in lora.items()}
        case "another width of one layer":
            return lora | {down: torch.ones(2, 64)}
        case "ranks that differ":
            return lora | {up: torch.ones(32, 3)}
        case "rank 0":
            return lora | {up: torch.ones(32, 0), down: torch.ones(0, 128)}
        case "kernels of a convolution":
            return lora | {up: torch.ones(32, 2, 1, 1), down: torch.ones(2, 128, 1, 1)}
        case "a number":
            return lora | {up: torch.tensor(1.0)}
        case "a half missing":
            return {key: tensor for key, tensor in lora.items() if key != up}
        case "twice":
            return lora | {down.replace("lora_A.", "lora_A.second."): lora[down].clone()}
        case "twice, in two spellings":
            alias = "single_blocks.1.linear2"
            return lora | {f"{alias}.lora_A.weight": lora[down].clone(), f"{alias}.lora_B.weight": lora[up].clone()}
        case "all B zero":
            return {key: tensor * ("lora_A" in key) for key, tensor in lora.items()}
        case "all A zero":
            return {key: tensor * ("lora_B" in key) for key, tensor in lora.items()}
        case "alpha 0":
            return lora | {key.replace("lora_A.weight", "alpha"): torch.tensor(0.0) for key in lora if "lora_A" in key}
        case "NaN":
            return lora | {up: torch.full_like(lora[up], math.nan)}
        case "whole numbers":
            return lora | {up: lora[up].long()}


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "half of the keys unknown",
            r"15 of its 30 keys have no place in this transformer: transformer\..*weights, .* and 12 more",
        ),
        (
            "another model's keys",
            r"30 of its 30 keys have no place in this transformer: transformer\.layers\..* and 27 more",
        ),
        ("a text encoder's keys too", r"1 of its 31 keys .* text_encoder\.layers\.0"),
        ("kohya's text encoder", r"1 of its 31 keys .* lora_te1_text_model"),
        ("DoRA", r"1 of its 31 keys .*lora_magnitude_vector"),
        ("whole differences", r"1 of its 1 keys .*\.diff"),
        ("a weight of the model", r"1 of its 31 keys .*x_embedder\.weight"),
        ("no keys", "holds no LoRA"),
        (
            "another width",
            r"leads from 32 values to 192, but the factors are of shape \(2, 64\) and \(384, 2\)",
        ),
        ("another width of one layer", r"single_transformer_blocks\.1\.attn\.to_out leads from 128 values to 32"),
        ("ranks that differ", r"of shape \(2, 128\) and \(32, 3\)"),
        ("rank 0", r"of shape \(0, 128\) and \(32, 0\)"),
        ("kernels of a convolution", r"of shape \(2, 128, 1, 1\)"),
        ("a number", r"of shape \(2, 128\) and \(\)"),
        ("a half missing", r"one half alone of the LoRA of single_transformer_blocks\.1\.attn\.to_out"),
        ("twice", r"two LoRAs of single_transformer_blocks\.1\.attn\.to_out"),
        ("twice, in two spellings", r"two LoRAs of single_transformer_blocks\.1\.attn\.to_out"),
        ("all B zero", "changes nothing"),
        ("all A zero", "changes nothing"),
        ("alpha 0", "changes nothing"),
        ("NaN", r"NaN or infinite values, in single_transformer_blocks\.1\.attn\.to_out"),
        ("whole numbers", r"single_transformer_blocks\.1\.attn\.to_out .*torch\.int64"),
    ],
)
def test_what_does_not_load_whole_does_not_load(what, message, pipe, diffusers, tmp_path):
    save_file(broken(what, spelled(diffusers, "transformer.{}")), tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        pipe.load_lora_weights(tmp_path / "style.safetensors")
    assert "style.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not getattr(pipe.transformer, "peft_config", None)


def test_which_file(pipe, diffusers, tmp_path):
    first, second = (tmp_path / name for name in ("b.safetensors", "a.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors: no such file"):
        pipe.load_lora_weights(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors: no such file"):
        pipe.load_lora_weights("gone.safetensors")
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        pipe.load_lora_weights("gone", local_files_only=True)
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(FileNotFoundError, match=r"other formats are not read; it has pytorch_lora_weights.bin"):
        pipe.load_lora_weights(tmp_path)
    save_file(spelled(diffusers), first)
    pipe.load_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    second.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"has several files, a.safetensors, b.safetensors: which one"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"a.safetensors is not a complete safetensors file"):
        pipe.load_lora_weights(second)
    with pytest.raises(FileNotFoundError, match=r"has no c.safetensors"):
        pipe.load_lora_weights(tmp_path, weight_name="c.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")


def test_a_file_of_the_hub(pipe, diffusers, tmp_path, monkeypatch):
    """By its cache on this machine, as without the network."""
    snapshot = tmp_path / "models--someone--styles" / "snapshots" / ("0" * 40)
    (snapshot / "old").mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    save_file(spelled(diffusers), snapshot / "a.safetensors")
    save_file(spelled(diffusers), snapshot / "old" / "b.safetensors")
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    for name, more in (
        ("someone/styles", {}),
        ("someone/styles/a.safetensors", {}),
        ("someone/styles/old/b.safetensors", {}),
        ("someone/styles", {"subfolder": "old"}),
        ("someone/styles", {"weight_name": "a.safetensors"}),
    ):
        pipe.load_lora_weights(name, **more, **hub)
        pipe.unload_lora_weights()
    with pytest.raises(FileNotFoundError, match=r"someone/styles/c.safetensors: no such file"):
        pipe.load_lora_weights("someone/styles/c.safetensors", **hub)
