"""Models and configs from elsewhere that are truncated, incomplete, of the wrong shape or type, or absurd.

Each is one line that names the culprit, before memory is taken for it. They are tried in a process of their own, which
tells its peak of memory: `python tests/test_hostile_models.py FILE` writes it, and what came of each.
"""

import json
import math
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import make_pipeline, published_autoencoder

from mf_diffusers import ModalityForcingPipeline
from mf_diffusers.checkpoints import load_pipeline, read_checkpoint
from mf_diffusers.modality_forcing.conversion import export_published_transformer


HUGE = 10**9
INDEX = "model_index.json"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
SHARDS = "transformer/diffusion_pytorch_model.safetensors.index.json"
ENCODER, DECODER, PUBLISHED = "ae_encoder.safetensors", "ae_decoder.safetensors", "model.safetensors"


# Faults: each is done to a folder.


def settings(file, **values):
    def fault(folder):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))

    return fault


def without(file, *names):
    def fault(folder):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({k: v for k, v in config.items() if k not in names}))

    return fault


def content(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def cut(file, share=0.5):
    def fault(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(share * len(data))])

    return fault


def gone(*files):
    return lambda folder: [(folder / file).unlink() for file in files]


def folder_gone(part):
    return lambda folder: shutil.rmtree(folder / part)


def pickled(file):
    """Stored as transformers and diffusers once did."""

    def fault(folder):
        torch.save(load_file(folder / file), (folder / file).with_name("pytorch_model.bin"))
        (folder / file).unlink()

    return fault


def weights(file, change):
    def fault(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return fault


def weight(file, name, tensor):
    """Another tensor in the place of one, or one more; None takes it away."""
    return weights(file, lambda w: w.pop(name) if tensor is None else w.update({name: tensor}))


def header(file, name, **entry):
    """A header that says of a tensor what is not so."""

    def fault(folder):
        data = (folder / file).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + length])
        found[name] |= entry
        text = json.dumps(found).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return fault


def sharded(change=lambda folder, index: None):
    """A transformer in several files, and a change to its index."""

    def fault(folder):
        make_pipeline().transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
        (folder / TRANSFORMER).unlink()
        index = json.loads((folder / SHARDS).read_text())
        assert len(set(index["weight_map"].values())) > 2
        change(folder, index)
        (folder / SHARDS).write_text(json.dumps(index))

    return fault


def both(first, second):
    return lambda folder: [first(folder), second(folder)]


CONFIG, VAE_CONFIG, TEXT_CONFIG = (f"{part}/config.json" for part in ("transformer", "vae", "text_encoder"))
SCHEDULER, DEPTH_SCHEDULER = (f"{part}/scheduler_config.json" for part in ("scheduler", "depth_scheduler"))
DEPTH = "depth_processor/depth_processor_config.json"
X = "x_embedder.weight"
NORM = "model.norm.weight"
ONE = torch.ones(1)

# What is wrong, and a part of the message. The folders are those of `make_folders`.
PIPELINE = {
    "index: truncated": (cut(INDEX), r"model_index\.json is damaged or no JSON"),
    "index: empty": (content(INDEX, b""), r"model_index\.json is damaged or no JSON"),
    "index: a list": (content(INDEX, b"[1, 2]"), r"model_index\.json must hold names with values"),
    "index: another pipeline": (
        settings(INDEX, _class_name="StableDiffusionPipeline"),
        "is of a StableDiffusionPipeline",
    ),
    "index: no vae": (without(INDEX, "vae"), r"model_index\.json names no vae"),
    "index: transformer null": (settings(INDEX, transformer=[None, None]), "transformer must be a library and a class"),
    "index: transformer a string": (settings(INDEX, transformer="x"), "transformer must be a library and a class"),
    "index: any library": (settings(INDEX, scheduler=["os", "system"]), "scheduler must be of class FlowMatchEuler"),
    "index: a known class of any library": (
        settings(INDEX, vae=["os", "AutoencoderKLFlux2"]),
        "vae must be of class A",
    ),
    "index: another vae": (
        settings(INDEX, vae=["diffusers", "AutoencoderTiny"]),
        "vae must be of class A",
    ),
    "index: another text encoder": (
        settings(INDEX, text_encoder=["transformers", "GPT2LMHeadModel"]),
        "text_encoder must be of class Qwen3ForCausalLM or Qwen3Model or UMT5EncoderModel",
    ),
    "index: another tokenizer": (settings(INDEX, tokenizer=["transformers", "GPT2Config"]), "must be a tokenizer"),
    "index: no tokenizer": (without(INDEX, "tokenizer"), "names a text_encoder, but no tokenizer"),
    "index: no depth scheduler": (without(INDEX, "depth_scheduler"), "names no depth_scheduler, but the transformer"),
    "index: no depth processor": (without(INDEX, "depth_processor"), "names no depth_processor, but the transformer"),
    "index: misspelt": (settings(INDEX, default_log2alpha=3.0), "knows no default_log2alpha"),
    "index: layers a string": (
        settings(INDEX, text_encoder_out_layers="all"),
        "text_encoder_out_layers must be of type",
    ),
    "index: layers of strings": (settings(INDEX, text_encoder_out_layers=["1"]), "text_encoder_out_layers must be of"),
    "index: no layers": (settings(INDEX, text_encoder_out_layers=[]), r"text_encoder_out_layers is \[\]"),
    "index: layers out of range": (
        settings(INDEX, text_encoder_out_layers=[1, 2, 99]),
        "text encoder .* has layers 0 to 4",
    ),
    "index: layers below range": (
        settings(INDEX, text_encoder_out_layers=[-9, 2, 3]),
        "text encoder .* has layers 0 to 4",
    ),
    "index: too few layers": (settings(INDEX, text_encoder_out_layers=[1, 2]), "features of width 32, .* takes 48"),
    "index: length a string": (settings(INDEX, max_sequence_length="64"), "max_sequence_length must be of type int"),
    "index: length 0": (settings(INDEX, max_sequence_length=0), "max_sequence_length must be from 1"),
    "index: length absurd": (settings(INDEX, max_sequence_length=HUGE), "max_sequence_length must be from 1 to 32768"),
    "index: size absurd": (settings(INDEX, default_sample_size=HUGE), "default_sample_size must be from 1 to 16384"),
    "index: alpha NaN": (settings(INDEX, default_log2_alpha=math.nan), "default_log2_alpha must be of type float"),
    "index: alpha absurd": (settings(INDEX, default_log2_alpha=1e6), "default_log2_alpha must be from -30 to 30"),
    # Transformer
    "transformer: no config": (gone(CONFIG), r"transformer/config\.json is missing"),
    "transformer: no folder": (folder_gone("transformer"), r"transformer/config\.json is missing"),
    "transformer: config truncated": (cut(CONFIG), r"transformer/config\.json is damaged or no JSON"),
    "transformer: config no text": (content(CONFIG, b"\xff\xfe\x00\x81"), r"transformer/config\.json is damaged"),
    "transformer: config nested": (
        content(CONFIG, b'{"a":' * 10**5),
        r"transformer/config\.json is damaged or no JSON",
    ),
    "transformer: config endless": (content(CONFIG, b" " * 20 * 2**20), r"transformer/config\.json is no config"),
    "transformer: another class": (
        settings(CONFIG, _class_name="UNet2DConditionModel"),
        "is of a UNet2DConditionModel",
    ),
    "transformer: misspelt": (settings(CONFIG, num_layer=2), r"transformer/config\.json: .* knows no num_layer"),
    "transformer: layers a string": (
        settings(CONFIG, num_layers="two"),
        "num_layers must be of type int, but it is 'two'",
    ),
    "transformer: layers a fraction": (
        settings(CONFIG, num_layers=2.5),
        "num_layers must be of type int, but it is 2.5",
    ),
    "transformer: layers null": (settings(CONFIG, num_layers=None), "num_layers must be of type int, but it is None"),
    "transformer: layers true": (settings(CONFIG, num_layers=True), "num_layers must be of type int, but it is True"),
    "transformer: too few layers": (
        settings(CONFIG, num_layers=1),
        r"config does not describe: transformer_blocks\.1\.",
    ),
    "transformer: too many layers": (settings(CONFIG, num_layers=3), r"lack transformer_blocks\.2\."),
    "transformer: layers below 0": (
        settings(CONFIG, num_single_layers=-2),
        r"config does not describe: single_transfo",
    ),
    "transformer: layers absurd": (settings(CONFIG, num_layers=HUGE), "describes a model of more than"),
    "transformer: decoder absurd": (settings(CONFIG, num_depth_decoder_layers=HUGE), "describes a model of more than"),
    "transformer: heads absurd": (settings(CONFIG, num_attention_heads=HUGE), "describes a model of more than"),
    "transformer: width absurd": (settings(CONFIG, joint_attention_dim=10**15), "describes a model of more than"),
    "transformer: no width, layers absurd": (
        settings(CONFIG, num_attention_heads=0, num_layers=HUGE),
        r"transformer/config\.json",
    ),
    "transformer: beyond numbers": (settings(CONFIG, joint_attention_dim=10**30), r"transformer/config\.json"),
    "transformer: ratio absurd": (settings(CONFIG, mlp_ratio=1e300), r"transformer/config\.json"),
    "transformer: ratio NaN": (settings(CONFIG, mlp_ratio=math.nan), "mlp_ratio must be of type float"),
    "transformer: ratio other": (
        settings(CONFIG, mlp_ratio=2.0),
        r"transformer.*has shape \(.*\) in the weights, but by",
    ),
    "transformer: no heads": (settings(CONFIG, num_attention_heads=0), r"transformer.*has shape"),
    "transformer: axes": (settings(CONFIG, axes_dims_rope=[4, 4, 4]), r"axes_dims_rope \(4, 4, 4\) must add up to"),
    "transformer: axes a number": (settings(CONFIG, axes_dims_rope=16), "axes_dims_rope must be of type tuple"),
    "transformer: eps below 0": (settings(CONFIG, eps=-1.0), "eps must be from 0 to 1"),
    "transformer: theta 0": (settings(CONFIG, rope_theta=0), "rope_theta must be from 1"),
    "transformer: depth null": (settings(CONFIG, depth_channels=None), "depth_channels must be of type int"),
    "transformer: no weights": (gone(TRANSFORMER), r"diffusion_pytorch_model\.safetensors is missing"),
    "transformer: pickled": (
        pickled(TRANSFORMER),
        r"only safetensors is read\. There is config\.json, pytorch_model\.bin",
    ),
    "transformer: weights truncated": (cut(TRANSFORMER, 0.9), r"transformer/.*not a complete safetensors file"),
    "transformer: weights of 5 bytes": (
        content(TRANSFORMER, b"12345"),
        r"transformer/.*not a complete safetensors file",
    ),
    "transformer: weights empty": (content(TRANSFORMER, b""), r"transformer/.*not a complete safetensors file"),
    "transformer: weights no safetensors": (content(TRANSFORMER, bytes(1000)), r"transformer/.*not a complete safeten"),
    "transformer: header absurd": (
        content(TRANSFORMER, b"\xff" * 7 + b"\x0f{}"),
        r"transformer/.*not a complete safeten",
    ),
    "transformer: header no JSON": (content(TRANSFORMER, b"\4" + bytes(7) + b"{{{{"), r"transformer/.*by its header"),
    "transformer: header a list": (content(TRANSFORMER, b"\2" + bytes(7) + b"[]"), r"transformer/.*by its header"),
    "transformer: header of huge shape": (header(TRANSFORMER, X, shape=[HUGE, HUGE]), r"transformer/.*by its header"),
    "transformer: header below 0": (header(TRANSFORMER, X, shape=[-32, -16]), r"transformer/.*by its header"),
    "transformer: unknown dtype": (
        header(TRANSFORMER, X, dtype="F128"),
        r"transformer/.*by its header: KeyError\('F128'\)",
    ),
    "transformer: a weight missing": (
        weight(TRANSFORMER, X, None),
        r"The weights in .*transformer lack x_embedder\.weight",
    ),
    "transformer: a weight more": (
        weight(TRANSFORMER, "new", ONE),
        r"transformer hold what .*not describe: new",
    ),
    "transformer: a LoRA in it": (
        weights(TRANSFORMER, lambda w: w.update({"proj_out.base_layer.weight": w.pop("proj_out.weight")})),
        r"The weights in .*transformer lack proj_out\.weight",
    ),
    "transformer: another shape": (
        weight(TRANSFORMER, X, torch.ones(32, 17)),
        r"x_embedder\.weight has shape \(32, 17\)",
    ),
    "transformer: whole numbers": (
        weight(TRANSFORMER, X, torch.ones(32, 16, dtype=torch.int8)),
        r"stored as torch\.int8",
    ),
    "shards: one missing": (
        sharded(lambda f, i: (f / "transformer" / i["weight_map"][X]).unlink()),
        r"is missing, which",
    ),
    "shards: one truncated": (
        sharded(lambda f, i: cut(f"transformer/{i['weight_map'][X]}")(f)),
        r"transformer/.*-of-.*not a complete safetensors file",
    ),
    "shards: elsewhere": (
        sharded(lambda f, i: i["weight_map"].update({X: "../../x.safetensors"})),
        r"x\.safetensors is mis",
    ),
    "shards: no map": (sharded(lambda f, i: i.pop("weight_map")), "must have a weight_map"),
    "shards: map of numbers": (sharded(lambda f, i: i["weight_map"].update({X: 3})), "must have a weight_map"),
    "shards: a weight nowhere": (
        sharded(lambda f, i: i["weight_map"].update({"new": i["weight_map"][X]})),
        "differ in the weights new",
    ),
    "shards: layers absurd": (
        both(sharded(), settings(CONFIG, num_single_layers=HUGE)),
        "describes a model of more than",
    ),
    # Autoencoder
    "vae: no config": (gone(VAE_CONFIG), r"vae/config\.json is missing"),
    "vae: a weight missing": (
        weight(VAE, "decoder.conv_in.weight", None),
        r"The weights in .*vae lack decoder\.conv_in",
    ),
    "vae: statistics missing": (weight(VAE, "bn.running_mean", None), r"The weights in .*vae lack bn\.running_mean"),
    "vae: a weight more": (
        weight(VAE, "decoder.new", ONE),
        r"vae hold what .*not describe: decoder\.new",
    ),
    "vae: another shape": (weight(VAE, "decoder.conv_in.bias", ONE), r"vae: decoder\.conv_in\.bias has shape \(1,\)"),
    "vae: channels a string": (settings(VAE_CONFIG, latent_channels="4"), "latent_channels must be of type int"),
    "vae: channels absurd": (settings(VAE_CONFIG, block_out_channels=[10**7] * 2), "describes a model of more than"),
    "vae: layers absurd": (settings(VAE_CONFIG, layers_per_block=HUGE), "describes a model of more than"),
    "vae: unknown blocks": (settings(VAE_CONFIG, down_block_types=["X", "Y"]), r"vae/config\.json makes no .*X does"),
    "vae: groups": (settings(VAE_CONFIG, norm_num_groups=3), r"vae/config\.json makes no AutoencoderKLFlux2"),
    "vae: no groups": (settings(VAE_CONFIG, norm_num_groups=0), r"vae/config\.json makes no AutoencoderKLFlux2"),
    "vae: truncated": (cut(VAE), r"vae/.*not a complete safetensors file"),
    # Text encoder
    "text: no config": (gone(TEXT_CONFIG), r"text_encoder/config\.json is missing"),
    "text: pickled": (pickled(TEXT), r"text_encoder/model\.safetensors is missing; only safetensors is read"),
    "text: truncated": (cut(TEXT), r"text_encoder/.*not a complete safetensors file"),
    "text: another model": (settings(TEXT_CONFIG, model_type="gpt2"), "model type 'gpt2'; 'qwen3' is needed"),
    "text: layers a string": (settings(TEXT_CONFIG, num_hidden_layers="4"), "num_hidden_layers"),
    "text: layers absurd": (settings(TEXT_CONFIG, num_hidden_layers=HUGE), "num_hidden_layers is 1,000,000,000"),
    "text: width absurd": (settings(TEXT_CONFIG, hidden_size=10**8), "text_encoder/.*describes a model of more"),
    "text: words absurd": (settings(TEXT_CONFIG, vocab_size=10**12), "text_encoder/.*describes a model of more"),
    "text: layer kinds": (settings(TEXT_CONFIG, layer_types=["x"] * 4), r"text_encoder/config\.json"),
    "text: a weight missing": (weight(TEXT, NORM, None), r"The weights in .*text_encoder lack model\.norm\.weight"),
    "text: a weight more": (weight(TEXT, "new", ONE), r"text_encoder hold what .*not describe: new"),
    "text: another shape": (weight(TEXT, NORM, ONE), r"text_encoder: model\.norm\.weight has shape \(1,\)"),
    # Parts without weights
    "scheduler: no config": (folder_gone("scheduler"), r"scheduler/scheduler_config\.json is missing"),
    "scheduler: shift a string": (settings(SCHEDULER, shift="x"), "shift must be of type float"),
    "scheduler: shift 0": (settings(DEPTH_SCHEDULER, shift=0), "depth_scheduler/.*shift must be from"),
    "scheduler: shift infinite": (settings(SCHEDULER, shift=math.inf), "shift must be of type float"),
    "scheduler: steps absurd": (
        settings(SCHEDULER, num_train_timesteps=10**12),
        "num_train_timesteps must be from 1",
    ),
    "scheduler: another": (
        settings(SCHEDULER, _class_name="DDIMScheduler"),
        "is of a DDIMScheduler",
    ),
    "depth: no config": (folder_gone("depth_processor"), r"depth_processor_config\.json is missing"),
    "depth: far 0": (settings(DEPTH, far=0), "far be finite.*got 0.001 and 0"),
    "depth: far below near": (settings(DEPTH, far=1e-6), "near must lie above 0"),
    "depth: near 0": (settings(DEPTH, near=0), "near must lie above 0"),
    "depth: far a string": (settings(DEPTH, far="x"), "far must be of type float"),
    "depth: patches 0": (settings(DEPTH, patch_size=0), "patch_size must be at least 1"),
    "depth: patches other": (settings(DEPTH, patch_size=8), "patch_size is 8, .*be 4"),
    "depth: patches absurd": (settings(DEPTH, patch_size=HUGE), "patch_size is 1000"),
    "depth: misspelt": (settings(DEPTH, infinite=True), "knows no infinite"),
}
TOKENIZER = {  # found when it is opened, before the weights are
    "tokenizer: no folder": (folder_gone("tokenizer"), "tokenizer holds no tokenizer that can be read"),
    "tokenizer: truncated": (cut("tokenizer/tokenizer.json"), "tokenizer holds no tokenizer that can be read"),
    "tokenizer: of another model": (
        settings(
            "tokenizer/tokenizer.json",
            added_tokens=[
                {
                    "id": 10**4 + i,
                    "content": f"<{i}>",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i in range(200)
            ],
        ),
        "has .* tokens, but the text encoder knows",
    ),
}
PUBLISHED_LAYOUT = {
    "published: truncated": (cut(PUBLISHED), r"model\.safetensors is not a complete safetensors file"),
    "published: a weight missing": (weight(PUBLISHED, "dit.img_in.weight", None), r"Missing keys: img_in\.weight"),
    "published: a weight more": (weight(PUBLISHED, "dit.new", ONE), r"Unexpected keys: new"),
    "published: not a matrix": (weight(PUBLISHED, "dit.img_in.weight", ONE), r"img_in\.weight must have 2 axes"),
    "published: heads of nothing": (
        weight(PUBLISHED, "dit.single_blocks.0.norm.query_norm.scale", torch.ones(0)),
        r"query_norm\.scale must have 1 axes",
    ),
    "published: another shape": (
        weight(PUBLISHED, "dit.final_layer.linear.weight", torch.ones(17, 32)),
        r"model\.safetensors: proj_out\.weight has shape \(17, 32\)",
    ),
    "published: wide": (weight(PUBLISHED, "dit.img_in.weight", torch.ones(10**6, 1)), "describes a model of more than"),
    "published: a far block": (
        weight(PUBLISHED, "dit.double_blocks.999999999.img_attn.proj.weight", torch.ones(32, 32)),
        r"Missing keys: double_blocks\.2",
    ),
    "published: half an autoencoder": (gone(ENCODER), r"ae_encoder\.safetensors is missing"),
    "published: autoencoder truncated": (cut(DECODER), r"ae_decoder\.safetensors is not a complete safetensors file"),
    "published: autoencoder a weight missing": (weight(ENCODER, "conv_in.weight", None), r"conv_in\.weight is missing"),
    "published: autoencoder, other weights": (
        weight(DECODER, "conv_out.bias", ONE),
        r"conv_out\.bias has shape \(1,\)",
    ),
    "published: two halves the same": (
        lambda folder: shutil.copy(folder / ENCODER, folder / DECODER),
        r"ae_decoder\.safetensors",
    ),
}
CASES = {name: ("pipeline", *case) for name, case in (PIPELINE | TOKENIZER).items()}
CASES |= {name: ("published", *case) for name, case in PUBLISHED_LAYOUT.items()}


def make_folders(root):
    """A pipeline in both layouts, small."""
    pipe = make_pipeline()
    pipe.save_pretrained(root / "pipeline")
    (root / "published").mkdir()
    save_file(export_published_transformer(pipe.transformer.state_dict()), root / "published" / PUBLISHED)
    autoencoder = AutoencoderKLFlux2(  # the published layout stands for groups of 32 channels
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
    )
    for half in ("encoder", "decoder"):
        save_file(published_autoencoder(autoencoder.state_dict(), half), root / "published" / f"ae_{half}.safetensors")


def try_all():
    """What becomes of every case: for each door the error's type and message, or "opened"; seconds; and the peak."""
    with tempfile.TemporaryDirectory() as root:
        root, outcomes = Path(root), {}
        make_folders(root)
        for number, (name, (layout, fault, _)) in enumerate(CASES.items()):
            folder = root / f"{number:03}"
            shutil.copytree(root / layout, folder)
            fault(folder)
            started, outcomes[name] = time.perf_counter(), {}
            for door, open_model in (
                ("info", lambda f: read_checkpoint(str(f), offline=True)),
                ("load", lambda f: load_pipeline(str(f), "cpu", torch.float32, offline=True)),
            ):
                try:
                    open_model(folder)
                    outcomes[name][door] = ["opened", ""]
                except Exception as error:
                    kind = next(
                        k.__name__ for k in (ValueError, FileNotFoundError, type(error)) if isinstance(error, k)
                    )
                    outcomes[name][door] = [kind, str(error)]
            outcomes[name]["seconds"] = round(time.perf_counter() - started, 2)
            shutil.rmtree(folder)
        return {"outcomes": outcomes, "peak": peak_memory()}


def peak_memory() -> int:
    """The most bytes that this process has held. Of `ru_maxrss`, Linux lets a process inherit its parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    file = tmp_path_factory.mktemp("tried") / "outcomes.json"
    done = subprocess.run([sys.executable, __file__, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_culprit(name, tried):
    message = CASES[name][2]
    for door in ["load"] if name in TOKENIZER else ["info", "load"]:
        kind, text = tried["outcomes"][name][door]
        assert kind in ("ValueError", "FileNotFoundError"), (door, kind, text)
        assert re.search(message, text), (door, text)
        assert "\n" not in text
        assert len(text) < 500


def test_the_ordinary_ways_of_diffusers_name_the_weights_too(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    weight(TRANSFORMER, X, None)(tmp_path)
    with pytest.raises(ValueError, match=r"The weights in .*transformer lack x_embedder\.weight"):
        ModalityForcingPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The weights of the transformer lack x_embedder\.weight"):
        DiffusionPipeline.from_pretrained(tmp_path)
    weight(VAE, "decoder.conv_in.weight", None)(tmp_path)
    with pytest.raises(ValueError, match=r"The weights of the vae lack decoder\.conv_in\.weight"):
        DiffusionPipeline.from_pretrained(tmp_path, transformer=make_pipeline().transformer)


def test_a_text_encoder_from_elsewhere(tmp_path):
    pipe = make_pipeline()
    for part in (pipe.text_encoder, pipe.tokenizer):
        part.save_pretrained(tmp_path / "text_encoder")
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.load_text_encoder(tmp_path / "text_encoder", torch.float32)
    pipe.register_to_config(text_encoder_out_layers=[1, 2])
    with pytest.raises(ValueError, match="makes features of width 32, but the transformer takes 48"):
        pipe.load_text_encoder(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match="No known text encoder makes features of width 48"):
        pipe.load_text_encoder()
    pickled(TEXT)(tmp_path)
    with pytest.raises(FileNotFoundError, match="only safetensors is read"):
        pipe.load_text_encoder(tmp_path / "text_encoder")


def test_no_memory_is_taken_for_them(tried):
    assert len(CASES) >= 60
    assert tried["peak"] < 1e9


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(try_all(), indent=1))
