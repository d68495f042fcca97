"""The command line, from options to the files of a result, with a tiny random model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import OpenEXR
import pytest
import torch
import transformers
import trimesh
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TINY_DEPTH_DIT, close_depth, make_pipeline, make_tokenizer, published_autoencoder
from typer.testing import CliRunner

from mf_diffusers import ModalityForcingDiTTransformer2DModel, ModalityForcingPipeline, cli
from mf_diffusers.depth_io import read_depth
from mf_diffusers.geometry import FOV_DEGREES
from mf_diffusers.modality_forcing.backbones import BACKBONES
from mf_diffusers.modality_forcing.conversion import export_published_transformer
from mf_diffusers.modality_forcing.transformer_flux2 import ModalityForcingFlux2Transformer2DModel


ALWAYS = {"image.png", "depth.npy", "depth.png", "depth_colored.png", "metadata.json"}
# Random weights: pixels may be invalid, and all of them may be edges.
PERHAPS = {"mask.png", "points.ply", "points.glb"}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A diffusers folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def autoencoder():
    """Wider than the tiny pipeline's: the published layout stands for groups of 32 channels."""
    torch.manual_seed(0)
    return AutoencoderKLFlux2(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
    )


@pytest.fixture(scope="session")
def published(autoencoder, tmp_path_factory):
    """The transformer of `model` and an autoencoder in the published layout."""
    folder = tmp_path_factory.mktemp("published")
    save_file(export_published_transformer(make_pipeline().transformer.state_dict()), folder / "model.safetensors")
    for half in ("encoder", "decoder"):
        save_file(published_autoencoder(autoencoder.state_dict(), half), folder / f"ae_{half}.safetensors")
    return folder


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory):
    """A text encoder with as many layers as the published model reads, and features of the tiny model's width."""
    folder = tmp_path_factory.mktemp("text_encoder")
    config = make_pipeline().text_encoder.config.to_dict()
    config = transformers.Qwen3Config(**config | {"num_hidden_layers": 27, "layer_types": None})
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MF_DIFFUSERS_MODEL", raising=False)
    monkeypatch.delenv("MF_DIFFUSERS_DEBUG", raising=False)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def ramp(tmp_path):
    """A smooth depth map with a hole, float32 (24, 40)."""
    path = tmp_path / "ramp.npy"
    depth = np.linspace(1, 2, 40, dtype=np.float32)[None].repeat(24, 0)
    depth[4:6, 4:6] = 0
    np.save(path, depth)
    return path


def call(*arguments, **settings):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **settings)


def run(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refuse(*arguments, code=1):
    """The message of a call that must fail without a traceback."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    if code == 1:
        bars = r"[\r\x1b\[A]*Loading (pipeline components|weights)[^\r\n\x1b]*\n?"  # of slow machines may stand before
        message = re.sub(bars, "", result.stderr)
        assert message.startswith("error: ")
    return re.sub(r"[\s│]+", " ", result.stderr)


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def metadata(folder):
    return json.loads(Path(folder, "metadata.json").read_text())


def weights(folder):
    return {k: v for path in sorted(Path(folder).rglob("*.safetensors")) for k, v in load_file(path).items()}


def assert_equal_weights(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


# Results


def test_generate_writes_a_folder_for_each_result_and_each_can_be_repeated_alone(model):
    result = run("generate", "A cat, at Dawn!", "犬", "-m", model, "--num", 2, "--steps", 2, "--seed", 5, "--exr")
    folders = ["a-cat-at-dawn", "a-cat-at-dawn-002", "犬", "犬-002"]
    assert result.stdout.split() == [f"outputs/{name}" for name in folders]
    assert names("outputs") == set(folders)
    for number, name in enumerate(folders):
        written = names(f"outputs/{name}")
        assert ALWAYS | {"depth.exr"} <= written <= ALWAYS | PERHAPS | {"depth.exr"}
        assert metadata(f"outputs/{name}")["seed"] == 5 + number
    image, depth = Image.open("outputs/犬/image.png"), np.load("outputs/犬/depth.npy")
    assert (image.size, image.mode, depth.shape, depth.dtype) == ((32, 32), "RGB", (32, 32), np.float32)
    assert not np.array_equal(depth, np.load("outputs/犬-002/depth.npy"))

    again = metadata("outputs/犬-002")
    options = again["options"]
    run(
        *(again["command"], again["prompt"], "--model", options["model"], "--seed", again["seed"], "-o", "again"),
        *("--steps", options["steps"], "--guidance-scale", options["guidance_scale"]),
    )
    for name in ("depth.npy", "image.png", "depth.png"):
        assert Path("again/犬", name).read_bytes() == Path("outputs/犬-002", name).read_bytes()


def test_depth_keeps_the_size_of_the_photo_and_notes_all_that_made_it(model, photo):
    options = ["--ensemble", 3, "--steps", 2, "--prompt", "noise", "--dtype", "float32", "--device", "cpu"]
    run("depth", photo, "-m", model, *options)
    folder = Path("outputs/photo")
    assert ALWAYS | {"uncertainty.npy", "uncertainty.png"} <= names(folder)
    assert np.array_equal(Image.open(folder / "image.png"), Image.open(photo))
    depth, uncertainty = np.load(folder / "depth.npy"), np.load(folder / "uncertainty.npy")
    assert depth.shape == uncertainty.shape == (24, 50)
    assert (depth > 0).all()
    valid = np.ones_like(depth, dtype=bool)
    if (folder / "mask.png").is_file():
        valid = np.asarray(Image.open(folder / "mask.png")) > 0
    assert np.array_equal(read_depth(folder / "depth.png") > 0, valid)

    noted = metadata(folder)
    assert noted["input"]["path"] == str(photo.resolve())
    assert re.fullmatch("[0-9a-f]{64}", noted["input"]["sha256"])
    assert noted["versions"].keys() == {"python", "mf_diffusers", "torch", "diffusers", "transformers"}
    assert noted["size"] == {"width": 50, "height": 24}
    expected = {"command": "depth", "prompt": "noise", "seed": 0, "device": "cpu", "dtype": "float32"}
    assert noted | expected == noted
    expected = {"model": str(model), "steps": 2, "ensemble": 3, "guidance_scale": 1.0, "fov": None}
    assert noted["options"] | expected == noted["options"]
    assert noted["field_of_view"] == {"degrees": FOV_DEGREES, "from": "default"}
    assert noted["transformer"] == "ModalityForcingFlux2Transformer2DModel"
    assert noted["seconds"] > 0

    run("depth", photo, "-m", model, *options, "-o", "again")
    assert Path("again/photo/depth.npy").read_bytes() == (folder / "depth.npy").read_bytes()


def test_an_upright_photo_is_written_and_its_depth_fits_it(model, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.open(photo).save(photo.with_suffix(".jpg"), exif=exif)
    run("depth", photo.with_suffix(".jpg"), "-m", model, "--steps", 1)
    assert Image.open("outputs/photo/image.png").size == (24, 50)
    assert np.load("outputs/photo/depth.npy").shape == (50, 24)


def test_image_writes_the_given_depth_with_its_geometry(model, ramp):
    run("image", ramp, "-p", "a wall", "-m", model, "--steps", 2, "--log2-alpha", -8, "--fov", 70, "--depth-scale", 2)
    folder = Path("outputs/ramp")
    assert ALWAYS <= names(folder) <= ALWAYS | PERHAPS
    assert_completed(np.load(folder / "depth.npy"), 2 * np.load(ramp))
    assert Image.open(folder / "image.png").size == (40, 24)
    assert metadata(folder)["options"]["log2_alpha"] == -8


def assert_completed(depth, given):
    """Depth that was given is as it was; depth that was missing is made."""
    assert np.array_equal(depth[given > 0], given[given > 0])
    assert (depth > 0).all()


def test_inverse_depth_is_turned_and_its_zeros_are_missing(model, ramp):
    run("image", ramp, "-p", "a wall", "-m", model, "--steps", 1, "--inverse")
    expected = np.load(ramp)
    expected[expected > 0] = 1 / expected[expected > 0]
    assert_completed(np.load("outputs/ramp/depth.npy"), expected)


def test_the_key_picks_an_array(model, ramp):
    np.savez("two.npz", first=np.load(ramp), second=3 * np.load(ramp))
    run("image", "two.npz", "-p", "a wall", "-m", model, "--steps", 1, "--depth-key", "second")
    assert_completed(np.load("outputs/two/depth.npy"), 3 * np.load(ramp))


BACKGROUND = np.where(np.arange(24)[:, None] < 8, np.float32(1e10), np.linspace(1, 2, 40, dtype=np.float32))


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_a_repair_of_depth_is_said_with_quiet_too(model, quiet):
    np.save("a.npy", BACKGROUND)
    np.save("b.npy", BACKGROUND)
    said = run("image", "a.npy", "b.npy", "-p", "a wall", "-m", model, "--steps", 1, *quiet).stderr
    assert re.findall(r"warning: (\S+): ", said) == ["a.npy", "b.npy"]
    assert not quiet or said.count("\n") == 2
    assert "320 pixels hold 1e+10" in said
    assert "give --depth-infinite 1e+10 if it is infinitely far, --depth-max inf if it is their depth" in said
    depth = np.load("outputs/b/depth.npy")
    assert np.array_equal(depth[8:], BACKGROUND[8:])
    assert depth[:8].max() < 1e5  # made by the model


def test_options_say_what_the_background_is(model):
    np.save("a.npy", BACKGROUND)
    for options in (
        ["--depth-infinite", "1e10"],
        ["--depth-max", 5],
        ["--depth-invalid", 1e10, "--depth-invalid", 7],
        ["--depth-max", "inf"],
    ):
        assert not run("image", "a.npy", "-p", "a", "-m", model, "--steps", 1, "--overwrite", "-q", *options).stderr
        depth = np.load("outputs/a/depth.npy")
        assert np.array_equal(depth[8:], BACKGROUND[8:])
        assert (depth[:8] == 1e10).all() == (options[-1] == "inf")
    assert metadata("outputs/a")["options"]["depth_max"] == "inf"


def test_infinite_depth_reaches_the_model_that_knows_it(tmp_path):
    pipe = make_pipeline()
    np.save("a.npy", np.where(BACKGROUND == 1e10, np.float32(np.inf), BACKGROUND))
    pictures = {}
    for known in (True, False):
        pipe.depth_processor.register_to_config(infinite_depth=known)
        pipe.save_pretrained(tmp_path / str(known))
        for given, options in (("inf", []), ("missing", ["--depth-invalid", "inf"])):
            run("image", "a.npy", "-p", "a", "-m", tmp_path / str(known), "--steps", 2, "--overwrite", *options)
            pictures[known, given] = np.asarray(Image.open("outputs/a/image.png"))
    missing = pictures[False, "missing"]
    assert np.array_equal(pictures[False, "inf"], missing)
    assert np.array_equal(pictures[True, "missing"], missing)
    assert not np.array_equal(pictures[True, "inf"], missing)


@pytest.mark.parametrize(
    "arguments",
    [["complete", "photo.png", "a.npy"], ["inpaint", "photo.png", "--depth", "a.npy", "-p", "a", "--strength", 1]],
)
def test_every_command_that_takes_depth_takes_its_options(model, photo, arguments):
    with Image.open(photo) as picture:
        picture.resize((40, 24)).save("photo.png")
    np.save("a.npy", BACKGROUND)
    said = run(*arguments, "-m", model, "--steps", 1, "-q").stderr
    assert "a.npy: 320 pixels hold 1e+10" in said
    assert not run(*arguments, "-m", model, "--steps", 1, "-q", "--depth-invalid", 1e10, "--inverse").stderr
    assert metadata("outputs/photo-002")["options"]["depth_invalid"] == "[10000000000.0]"


def test_errors_of_depth_files_name_the_options(model):
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {"U": BACKGROUND, "V": BACKGROUND}).write("a.exr")
    message = refuse("image", "a.exr", "-p", "a", "-m", model)
    assert "among ['U', 'V']; name one of them with --depth-key" in message
    np.save("a.npy", BACKGROUND)
    assert "--depth-scale -1.0 must be a positive number" in refuse(
        "image", "a.npy", "-p", "a", "-m", model, "--depth-scale", -1
    )


def test_the_size_to_work_at(model, photo):
    depths = []
    for size in (None, 16, 48):
        run("depth", photo, "-m", model, "--steps", 1, "-o", str(size), *(() if size is None else ("--size", size)))
        depths.append(np.load(f"{size}/photo/depth.npy"))
        assert metadata(f"{size}/photo")["options"]["size"] == size
    assert len({depth.shape for depth in depths}) == 1  # as large as the photo
    assert not np.allclose(depths[0], depths[1]) and not np.allclose(depths[0], depths[2])


def test_results_are_not_overwritten_unless_asked(model, photo):
    for _ in range(3):
        run("depth", photo, "-m", model, "--steps", 1)
    assert names("outputs") == {"photo", "photo-002", "photo-003"}
    before = Path("outputs/photo-002/metadata.json").read_bytes()
    Path("outputs/photo/extra.txt").touch()
    run("depth", photo, "-m", model, "--steps", 1, "--seed", 9, "--overwrite")
    assert names("outputs") == {"photo", "photo-002", "photo-003"}
    assert metadata("outputs/photo")["seed"] == 9
    assert not Path("outputs/photo/extra.txt").exists()
    assert Path("outputs/photo-002/metadata.json").read_bytes() == before


def test_overwrite_spares_what_is_no_result_and_the_results_of_the_same_call(model, photo):
    Path("outputs/photo").mkdir(parents=True)
    Path("outputs/photo/diary.txt").write_text("dear")
    shutil.copy(photo, "photo.webp")
    run("depth", photo, "photo.webp", "-m", model, "--steps", 1, "--overwrite")
    assert names("outputs") == {"photo", "photo-002", "photo-003"}
    assert names("outputs/photo") == {"diary.txt"}


def test_a_folder_of_files_and_a_broken_one_among_them(model, photo):
    Path("in/a_broken.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    Path("in/.hidden.png").write_bytes(b"")
    Path("in/notes.txt").write_text("no picture")
    result = call("depth", "in", "gone.png", "-m", model, "--steps", 1, "--seed", 3)
    assert result.exit_code == 1
    assert result.stdout.split() == ["outputs/photo"]
    assert "error: in/a_broken.jpg: cannot be read as a picture" in result.stderr
    assert "error: gone.png: no such file" in result.stderr
    assert "2 of 3 failed, 1 are written." in result.stderr
    assert "Traceback" not in result.output
    assert names("outputs") == {"photo"}
    assert metadata("outputs/photo")["seed"] == 4  # its place in the call, whatever became of the others


def test_an_interrupted_run_leaves_nothing(model, photo, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mf_diffusers.results.colorize_depth", interrupt)
    result = call("depth", photo, "-m", model, "--steps", 1)
    assert result.exit_code != 0
    assert names("outputs") == set()


def test_lora_and_model_from_the_environment(model, photo, monkeypatch):
    monkeypatch.setenv("MF_DIFFUSERS_MODEL", str(model))
    transformer = make_pipeline().transformer
    key = "transformer.single_transformer_blocks.0.attn.to_out"
    rows, columns = transformer.single_transformer_blocks[0].attn.to_out.weight.shape
    generator = torch.Generator().manual_seed(0)
    lora = {
        f"{key}.lora_A.weight": torch.randn(2, columns, generator=generator),
        f"{key}.lora_B.weight": torch.randn(rows, 2, generator=generator),
    }
    save_file(lora, "lora.safetensors")
    run("depth", photo, "--steps", 1, "--quiet")
    assert run("depth", photo, "--steps", 1, "--lora", "lora.safetensors", "--quiet").stdout == ""
    assert metadata("outputs/photo-002")["options"]["lora"] == "lora.safetensors"
    assert not np.array_equal(np.load("outputs/photo/depth.npy"), np.load("outputs/photo-002/depth.npy"))


# Errors


def test_an_output_folder_that_cannot_be_written_is_found_out_before_the_model_is_loaded(photo):
    Path("file").touch()
    message = refuse("depth", photo, "-m", "no/such/model", "-o", "file/outputs")
    assert "file/outputs" in message
    assert "model" not in message


def test_inputs_that_are_missing_are_found_out_before_the_model_is_loaded(tmp_path):
    assert "gone.png: no such file" in refuse("depth", "gone.png", "-m", "no/such/model")
    assert "no file in this folder ends in .png" in refuse("depth", tmp_path, "-m", "no/such/model")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dtype", "fp16"], "overflows in float16"),
        (["--dtype", "int8"], "'int8' is none of auto, bfloat16, float32"),
        (["--offload", "disk"], "'disk' is none of none, model, group"),
        (["--steps", "0"], "--steps"),
        (["--fov", "180"], "--fov"),
        (["--ensemble", "x"], "--ensemble"),
        (["--negative", "x"], "No such option"),
        (["--log2-alpha", "2"], "No such option"),
    ],
)
def test_bad_options(arguments, message, photo):
    assert message in refuse("depth", photo, "-m", "model", *arguments, code=2)


def test_a_model_is_needed(photo):
    assert "--model" in refuse("depth", photo, code=2)
    assert "--prompt" in refuse("image", photo, "-m", "model", code=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "xpu"], "--device xpu: torch sees"),
        (["--device", "cpu", "--offload", "model"], "--offload model needs a GPU"),
        (["--model", "in"], "has neither model_index.json"),
        (["--model", "in/photo.png"], "is a file"),
        (["--model", "a/b/c"], "a/b/c: no such file or folder, nor such a repository on the Hub"),
        (["--model", "no/model", "--offline"], "no/model: no such file or folder, and no copy"),
        (["--lora", "gone.safetensors"], "gone.safetensors: no such file or folder"),
        (
            ["--model", "other"],
            "is of a Flux2KleinPipeline; a ModalityForcingPipeline is needed",
        ),
    ],
)
def test_devices_and_models_that_are_not_there(arguments, message, photo):
    Path("other").mkdir()
    Path("other/model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    assert message in refuse("depth", photo, "-m", "in", *arguments)


def test_debug_shows_where_an_error_comes_from(photo, monkeypatch):
    monkeypatch.setenv("MF_DIFFUSERS_DEBUG", "1")
    assert isinstance(call("depth", photo, "-m", "in").exception, FileNotFoundError)


# Checkpoints


def test_convert_round_trip_from_published(published, autoencoder, text_encoder, photo):
    result = run("convert", published, "new/pipeline")
    assert "pipeline without a text encoder" in result.stdout
    assert "CC BY-NC 4.0" in result.stdout
    assert_equal_weights(weights("new/pipeline/vae"), autoencoder.state_dict())
    run("convert", "new/pipeline", "back.safetensors", "--prefix", "dit.")
    assert_equal_weights(load_file("back.safetensors"), load_file(published / "model.safetensors"))

    run("convert", published / "model.safetensors", "transformer")
    assert names("transformer") == {"config.json", "diffusion_pytorch_model.safetensors"}
    run("convert", "transformer", "bare.safetensors")
    bare = {f"dit.{key}": tensor for key, tensor in load_file("bare.safetensors").items()}
    assert_equal_weights(bare, load_file(published / "model.safetensors"))

    options = ["--text-encoder", text_encoder, "--steps", 1, "--height", 8, "--width", 16, "--dtype", "float32"]
    run("depth", photo, "-m", published, *options)
    run("depth", photo, "-m", "new/pipeline", *options)
    run("convert", published, "whole", "--text-encoder", text_encoder)
    run("depth", photo, "-m", "whole", *options[2:])
    depth, *others = (np.load(f"outputs/{name}/depth.npy") for name in ("photo", "photo-002", "photo-003"))
    for other in others:  # the same weights lie elsewhere in memory, on which the last bit of a product depends
        assert close_depth(other, depth)
    assert "give --text-encoder" in refuse("depth", photo, "-m", "new/pipeline")


def test_convert_round_trip_from_diffusers(model):
    run("convert", model, "single.safetensors")
    assert not any(key.startswith("dit.") for key in load_file("single.safetensors"))
    run("convert", "single.safetensors", "folder")
    assert_equal_weights(weights("folder"), weights(model / "transformer"))


def test_convert_keeps_the_dtype_but_for_the_depth_head(model):
    run("convert", model, "half.safetensors", "--dtype", "bfloat16")
    half = load_file("half.safetensors")
    assert half["img_in.weight"].dtype == torch.bfloat16
    assert half["depth_final_layer.linear.weight"].dtype == torch.float32
    run("convert", "half.safetensors", "half")
    run("convert", "half", "again.safetensors")
    assert_equal_weights(load_file("again.safetensors"), half)


def test_convert_replaces_only_when_asked_and_only_its_own(model, published):
    run("convert", model, "single.safetensors")
    assert "single.safetensors exists" in refuse("convert", model, "single.safetensors")
    run("convert", model, "single.safetensors", "--overwrite")
    Path("mine").mkdir()
    Path("mine/diary.txt").touch()
    assert "mine exists" in refuse("convert", published, "mine", "--overwrite")
    run("convert", published, "new")
    Path("new/extra.txt").touch()
    assert "new exists" in refuse("convert", published, "new")
    run("convert", published / "model.safetensors", "new", "--overwrite")
    assert names("new") == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert "DST that ends in .safetensors" in refuse("convert", model, "elsewhere")
    assert names(".") == {"single.safetensors", "mine", "new"}


def test_info_of_every_kind(model, published, tmp_path):
    reports = {
        kind: json.loads(run("info", path, "--json").stdout)
        for kind, path in {
            "pipeline": model,
            "transformer": model / "transformer",
            "published": published,
            "file": published / "model.safetensors",
        }.items()
    }
    transformer = ModalityForcingFlux2Transformer2DModel.from_pretrained(model / "transformer")
    for report in reports.values():
        assert report["parameters"]["transformer"] == transformer.num_parameters()
        added = sum(p.numel() for name, p in transformer.named_parameters() if "depth" in name)
        assert report["parameters_added_by_depth"] == added
        assert report["transformer"]["num_layers"] == transformer.config.num_layers
        assert report["width"] == 32
        assert report["dtypes"]["transformer"] == ["float32"]
    assert [report["kind"] for report in reports.values()] == [
        *("diffusers pipeline", "diffusers transformer", "published layout", "published layout")
    ]
    pipeline, alone = reports["pipeline"], reports["file"]
    assert pipeline["scheduler_shift"] == pytest.approx(reports["published"]["depth_scheduler_shift"])
    assert pipeline["text_encoder"] == "Qwen3ForCausalLM"
    assert pipeline["bytes_on_disk"] == sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    head = sum(p.numel() for p in transformer.depth_head.parameters())
    assert alone["bytes_of_bfloat16_weights"] == 2 * transformer.num_parameters() + 2 * head
    assert "parameters added by depth" in run("info", model).stdout


def test_info_of_what_is_no_model(published):
    Path("empty").mkdir()
    assert "empty: no model_index.json" in refuse("info", "empty")
    Path("cut.safetensors").write_bytes((published / "model.safetensors").read_bytes()[:100])
    assert "not a complete safetensors file" in refuse("info", "cut.safetensors")
    assert refuse("info", "no/such/model", "--offline")


def test_the_installed_command(model, photo):
    command = Path(sys.executable).with_name("mf-diffusers")
    environment = os.environ | {"MF_DIFFUSERS_MODEL": str(model), "PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run(
        [command, "depth", photo, "gone.png", "--steps", "1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stdout == "outputs/photo\n"
    assert "error: gone.png: no such file" in done.stderr
    assert "Traceback" not in done.stderr


# LoRAs and adapters


@pytest.fixture
def lora(tmp_path):
    """A folder with one LoRA, in a spelling of ComfyUI."""
    down, up = make_pipeline().transformer.single_transformer_blocks[0].attn.to_out.weight.shape[::-1]
    generator = torch.Generator().manual_seed(0)
    weights = {
        "diffusion_model.single_blocks.0.linear2.lora_down.weight": torch.randn(2, down, generator=generator),
        "diffusion_model.single_blocks.0.linear2.lora_up.weight": torch.randn(up, 2, generator=generator),
        "diffusion_model.single_blocks.0.linear2.alpha": torch.tensor(1.0),
    }
    (tmp_path / "styles").mkdir()
    save_file(weights, tmp_path / "styles" / "style.safetensors")
    return tmp_path / "styles"


def test_the_weight_of_a_lora_is_heard_and_noted(model, photo, lora):
    depths = []
    for number, options in enumerate(([], ["--lora", lora], ["--lora", lora, "--lora-weight", 0])):
        run("depth", photo, "-m", model, "--steps", 1, "-o", str(number), *options)
        depths.append(np.load(f"{number}/photo/depth.npy"))
        noted = metadata(f"{number}/photo")["options"]
        assert noted["lora"] == (str(lora) if options else None)
        assert noted["lora_weight"] == (0 if "--lora-weight" in options else 1)
    assert not np.array_equal(depths[0], depths[1])
    np.testing.assert_allclose(depths[2], depths[0], rtol=1e-5)


def test_a_lora_that_is_not_used_whole_is_no_result(model, photo, lora):
    weights = load_file(lora / "style.safetensors")
    save_file({f"text_encoder.{key}": tensor for key, tensor in weights.items()}, lora / "other.safetensors")
    assert "several files, other.safetensors, style.safetensors: which one" in refuse(
        "depth", photo, "-m", "no/such/model", "--lora", lora, "-q"
    )
    message = refuse("depth", photo, "-m", model, "--lora", lora / "other.safetensors", "-q")
    assert "other.safetensors is not loaded, for 3 of its 3 keys have no place in this transformer" in message
    assert not names("outputs")
    for weight in ("nan", "inf"):
        message = refuse("depth", photo, "-m", "no/such/model", "--lora-weight", weight)
        assert f"--lora-weight {weight} must be a finite number" in message
    assert "--edge-threshold inf must be a positive number" in refuse(
        "depth", photo, "-m", model, "--edge-threshold", "inf"
    )


def test_an_adapter_of_training(model, photo):
    """On its base, FLUX.2 [klein], and on a pipeline of the same base; `--lora` names the option that takes it."""
    pipe = make_pipeline()
    base = {name: value for name, value in pipe.transformer.config.items() if "depth" not in name and name[0] != "_"}
    torch.manual_seed(1)
    klein = Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**base),
        scheduler=pipe.scheduler,
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
    )
    klein.save_pretrained("klein")
    trained = ModalityForcingPipeline.from_base(klein, 1, text_encoder_out_layers=[1, 2, 3], default_sample_size=32)
    trained.save_pretrained("untrained")
    trained.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=BACKBONES["flux2"].lora_targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.transformer.named_parameters():
            if "depth" in name or "lora" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    trained.save_adapter("pipeline.adapter.safetensors", "klein")
    trained.transformer.fuse_lora()
    trained.transformer.unload_lora()
    trained.save_pretrained("trained")
    adapter = ["--adapter", "pipeline.adapter.safetensors"]
    depths = []
    for name, options in {"trained": [], "klein": adapter, "untrained": adapter}.items():
        run("depth", photo, "-m", name, "--steps", 1, "--dtype", "float32", "-o", f"of-{name}", *options)
        depths.append(np.load(f"of-{name}/photo/depth.npy"))
    for depth in depths[1:]:
        np.testing.assert_allclose(depth, depths[0], rtol=1e-3)
    assert metadata("of-klein/photo")["options"]["adapter"] == "pipeline.adapter.safetensors"
    refused = refuse("depth", photo, "-m", model, "--lora", "pipeline.adapter.safetensors")
    assert "is an adapter that training wrote: --adapter loads it" in refused
    assert "was trained on klein, which is not the base" in refuse("depth", photo, "-m", model, *adapter)
    assert "No weights at gone" in refuse("depth", photo, "-m", "no/such/model", "--adapter", "gone")
    assert "Flux2KleinPipeline" in refuse("depth", photo, "-m", "klein")


# Checkpoints that are links


def test_folders_and_files_that_are_links(model, photo):
    """As in the Hub's cache, and as people arrange large files."""
    Path("linked").mkdir()
    for path in model.iterdir():
        Path("linked", path.name).symlink_to(path)
    expected, report = (json.loads(run("info", folder, "--json").stdout) for folder in (model, "linked"))
    assert report == expected | {"model": "linked"}
    run("depth", photo, "-m", "linked", "--steps", 1)
    Path("blobs").mkdir()
    for path in [path for path in model.rglob("*") if path.is_file()]:
        link = Path("snapshot", path.relative_to(model))
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, f"blobs/{len(names('blobs'))}")
        link.symlink_to(Path(f"blobs/{len(names('blobs')) - 1}").resolve())
    assert json.loads(run("info", "snapshot", "--json").stdout) == expected | {"model": "snapshot"}
    run("convert", "snapshot", "whole.safetensors")


def test_the_from_scratch_family_has_no_published_layout():
    ModalityForcingDiTTransformer2DModel(**TINY_DEPTH_DIT).save_pretrained("dit")
    assert "the from-scratch family has no published layout" in refuse("convert", "dit", "dit.safetensors")
    assert json.loads(run("info", "dit", "--json").stdout)["kind"] == "diffusers transformer"


# Points


@pytest.fixture
def photo_with_focal_length(photo):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0xA405] = 26
    Image.open(photo).save(photo.with_suffix(".jpg"), exif=exif)
    return photo.with_suffix(".jpg")


@pytest.mark.parametrize("options, source", [((), "EXIF FocalLengthIn35mmFilm"), (("--fov", 50), "fov")])
def test_points_have_the_field_of_view_of_the_photo(model, photo_with_focal_length, options, source):
    size = ("--height", 48, "--width", 96)  # larger than the photo, whose points are then its pixels
    run("depth", photo_with_focal_length, "-m", model, "--steps", 1, "--edge-threshold", 0, *size, *options)
    folder = Path("outputs/photo")
    assert metadata(folder)["field_of_view"]["from"] == source
    x, _, z = trimesh.load(folder / "points.ply").vertices.T
    # Of the outermost pixels' centres; 26 mm of 43.27 along the diagonal of 50x24 pixels.
    tangent = {"fov": np.tan(np.radians(25)), "EXIF FocalLengthIn35mmFilm": 25 / (26 / 43.267 * np.hypot(50, 24))}
    assert np.abs(x / z).max() == pytest.approx(tangent[source] * 24.5 / 25, rel=1e-4)


def test_points_of_a_large_photo_have_the_resolution_at_which_depth_was_made(model, tmp_path):
    Image.linear_gradient("L").resize((1200, 900)).save("large.png")
    run("depth", "large.png", "-m", model, "--steps", 1, "--edge-threshold", 0, "--height", 48, "--width", 64)
    folder = Path("outputs/large")
    assert np.load(folder / "depth.npy").shape == (900, 1200)
    points = trimesh.load(folder / "points.ply").vertices
    assert len(points) <= 48 * 64
    surface = trimesh.load(folder / "points.glb", force="mesh", process=False)
    assert len(surface.vertices) <= len(points)
    run("depth", "large.png", "-m", model, "--steps", 1, "--edge-threshold", 0, "--max-points", 300)
    assert 0 < len(trimesh.load("outputs/large-002/points.ply").vertices) <= 300


def test_points_of_given_depth_have_its_own_resolution(model, ramp):
    np.save(ramp, np.maximum(np.load(ramp), 1))
    run("image", ramp, "-p", "a wall", "-m", model, "--steps", 1, "--edge-threshold", 0)
    assert len(trimesh.load("outputs/ramp/points.ply").vertices) == np.count_nonzero(np.load(ramp))


@pytest.mark.parametrize("missing", [0, 1, 100, 900])
def test_points_of_depth_given_in_part_are_as_many_as_were_given(model, missing, tmp_path):
    depth = np.linspace(2, 4, 60 * 80, dtype=np.float32).reshape(60, 80)
    depth.flat[:missing] = 0
    np.save("part.npy", depth)
    run("image", "part.npy", "-p", "a wall", "-m", model, "--steps", 1, "--edge-threshold", 0, "--size", 16)
    points = len(trimesh.load("outputs/part/points.ply").vertices)
    assert 0.8 * (depth.size - missing) <= points <= depth.size - missing


def test_a_size_that_cannot_fit_is_refused_before_any_work(model, photo):
    result = call("depth", photo, "-m", model, "--height", 1000000)
    said = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 1 and said.startswith("error: ")
    assert "GB of memory are free" in said and "--height" in said


# Folders


def test_folders_say_what_they_leave_aside(model, tmp_path, capfd):
    for name in ("a.png", "b.GIF", "c.jp2"):
        (tmp_path / "holiday").mkdir(exist_ok=True)
        Image.new("RGB", (32, 24), "gray").save(tmp_path / "holiday" / name)
    (tmp_path / "holiday" / "notes.txt").write_text("x")
    (tmp_path / "holiday" / "e.heic").write_text("x")
    (tmp_path / "holiday" / ".hidden.png").write_text("x")
    (tmp_path / "holiday" / "more").mkdir()
    Image.new("RGB", (32, 24), "gray").save(tmp_path / "holiday" / "more" / "d.webp")
    said = run("depth", tmp_path / "holiday", "-m", model, "--steps", 1, "--no-points", "-o", "flat").stderr
    assert names("flat") == {"a", "b", "c"}
    assert f"skipped {tmp_path}/holiday/e.heic, {tmp_path}/holiday/notes.txt: their names end in none of .png" in said
    assert f"skipped {tmp_path}/holiday/more: folders are looked into with --recursive" in said
    (tmp_path / "holiday" / "more" / "circle").symlink_to(tmp_path / "holiday")
    deep = ("-m", model, "--steps", 1, "--no-points", "-o", "deep", "--recursive")
    said = run("depth", tmp_path / "holiday", *deep).stderr
    assert names("deep") == {"a", "b", "c", "d"}
    assert f"skipped {tmp_path}/holiday/more/circle: links to folders are not followed" in said


@pytest.mark.parametrize("exr", [False, True])
def test_a_result_folder_gives_its_depth_once(model, ramp, exr):
    run("image", ramp, "-p", "a wall", "-m", model, "--steps", 1, *(["--exr"] if exr else []))
    Image.new("L", (40, 24), 255).save("outputs/ramp/mask.png")  # where all is valid, there is none
    run("image", "outputs/ramp", "-p", "a wall", "-m", model, "--steps", 1, "-o", "again")
    assert names("again") == {"ramp"}
    assert metadata("again/ramp")["input"]["path"].endswith("depth.exr" if exr else "depth.png")
    known = np.load(ramp) > 0
    assert np.allclose(np.load("again/ramp/depth.npy")[known], np.load(ramp)[known], rtol=1e-3)
    run("depth", "outputs/ramp", "-m", model, "--steps", 1, "-o", "depths")
    assert names("depths") == {"ramp"}
    assert metadata("depths/ramp")["input"]["path"].endswith("image.png")
    run("image", "outputs", "again", "-p", "x", "-m", model, "--steps", 1, "-o", "all", "--recursive", "--no-points")
    assert names("all") == {"ramp", "ramp-002"}


def test_a_batch_of_folders_without_a_picture_is_refused(model, tmp_path):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for options in ((), ("--recursive",)):
        assert "no file in this folder ends in .png" in refuse("depth", tmp_path / "empty", "-m", model, *options)
