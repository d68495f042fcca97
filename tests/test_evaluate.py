"""Evaluation runs, from files on disk to the report: with a tiny random model, and with predictions of known error."""

import csv
import json
import math
import shutil

import numpy as np
import OpenEXR
import pytest
import torch
from accelerate import PartialState, debug_launcher
from evaluation_runs import SIZE, STEPS, call, make_data, truth, write_lines
from PIL import Image
from tiny import make_pipeline
from typer.testing import CliRunner

from finetune.data.sources import FolderConfig, build_source
from finetune.training.validation import image_to_depth_metrics
from mf_diffusers import cli
from mf_diffusers.datasets.folder import Folder
from mf_diffusers.datasets.frame import Frame
from mf_diffusers.depth_io import read_values, write_depth
from mf_diffusers.evaluation.comparison import compare
from mf_diffusers.evaluation.images import (
    DepthEstimator,
    VisionFeatures,
    depth_following,
    depth_to_image_scores,
    frechet_distance,
    joint_consistency,
)
from mf_diffusers.evaluation.metrics import depth_metrics
from mf_diffusers.evaluation.predictors import FolderPredictor, ModelPredictor, weights_hash
from mf_diffusers.evaluation.protocol import Protocol
from mf_diffusers.evaluation.report import PUBLISHED, markdown
from mf_diffusers.evaluation.run import evaluate
from mf_diffusers.input_warning import InputWarning


pytest_plugins = ["evaluation_runs"]


def make_predictions(path, length=5, spread=0.05):
    """The truth, moved affinely and with noise."""
    path.mkdir()
    for number in range(length):
        noise = np.random.default_rng([number, 1]).normal(size=SIZE)
        np.save(path / f"{number}.npy", (0.3 * truth(number) + 0.2 + spread * noise).astype(np.float32))
    return path


@pytest.fixture
def predictions(tmp_path):
    return make_predictions(tmp_path / "predictions")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


def score(data, predictions, output, alignment="robust", limit=None, **protocol):
    predictor = FolderPredictor(predictions, disparity=alignment == "disparity")
    return evaluate(Folder(data), Protocol("folder", alignment, **protocol), predictor, output, limit)


def files(folder):
    """The contents of a run that must not depend on how it went."""
    names = ["report.json", "report.md", "frames.csv", *(f"worst/{p.name}" for p in sorted(folder.glob("worst/*")))]
    return {name: (folder / name).read_bytes() for name in names}


def test_a_run_with_a_model_and_its_saved_predictions(pipe, data, tmp_path):
    predictor = ModelPredictor(pipe, {"model": "tiny"}, steps=STEPS, seed=7)
    report = evaluate(Folder(data), Protocol("folder"), predictor, tmp_path / "run", save_predictions=True)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["predictor"]["steps"] == STEPS
    assert report["counts"]["frames_by_status"] == {"scored": 5}
    assert report["counts"]["pixels_left_out"] == {"missing": 5 * 9, "sky": 0, "out_of_range": 0, "cropped": 0}
    assert [frame["seed"] for frame in report["frames"]] == [7, 8, 9, 10, 11]
    assert len(list((tmp_path / "run" / "worst").glob("*.png"))) == 5

    # Every number by hand.
    frame = Folder(data)[3]
    generator = torch.Generator().manual_seed(10)
    depth = pipe(image=frame.image, num_inference_steps=STEPS, generator=generator).depth[0]
    aligned, _ = Protocol("folder").align(depth, frame.depth)
    assert report["frames"][3]["metrics"] == pytest.approx(depth_metrics(aligned, frame.depth), rel=1e-9)
    means = np.mean([frame["metrics"]["abs_rel"] for frame in report["frames"]])
    assert report["mean"]["abs_rel"] == pytest.approx(means)

    again = score(data, tmp_path / "run" / "predictions", tmp_path / "again")
    assert again["mean"] == pytest.approx(report["mean"], rel=1e-6)
    with (tmp_path / "run" / "frames.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["abs_rel"]) for row in rows] == [frame["metrics"]["abs_rel"] for frame in report["frames"]]


def test_the_number_of_training_validation(pipe, data, tmp_path):
    """The same frames, seeds and alignment: the same number, but for the rounding of batches."""
    source = build_source(FolderConfig(path=str(data), shuffle=False))
    validation = image_to_depth_metrics(pipe, source, count=5, steps=STEPS)
    predictor = ModelPredictor(pipe, {}, steps=STEPS)
    report = evaluate(Folder(data), Protocol("folder"), predictor, tmp_path / "run")
    assert report["mean"] == pytest.approx(validation, rel=1e-4)


def test_an_interrupted_run_ends_in_the_same_report(pipe, data, tmp_path):
    class Stopped(ModelPredictor):
        def __call__(self, frame, number):
            if number == 3:
                raise KeyboardInterrupt
            return super().__call__(frame, number)

    def start(kind, output, **options):
        return evaluate(Folder(data), Protocol("folder"), kind(pipe, {}, steps=STEPS), output, **options)

    start(ModelPredictor, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(Stopped, tmp_path / "stopped")
    assert len(list((tmp_path / "stopped" / "records").glob("*.json"))) == 3
    before = (tmp_path / "stopped" / "records" / "000001.json").stat().st_mtime_ns
    start(ModelPredictor, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "records" / "000001.json").stat().st_mtime_ns == before
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")

    start(ModelPredictor, tmp_path / "grown", limit=2)
    start(ModelPredictor, tmp_path / "grown")
    assert files(tmp_path / "grown") == files(tmp_path / "whole")

    with pytest.raises(ValueError, match=r"other settings \(predictor.steps 2, now 3\)"):
        evaluate(Folder(data), Protocol("folder"), ModelPredictor(pipe, {}, steps=3), tmp_path / "whole")
    anew = evaluate(Folder(data), Protocol("folder"), ModelPredictor(pipe, {}, 3), tmp_path / "whole", overwrite=True)
    assert anew["predictor"]["steps"] == 3


def one_of_two(options):
    """What each process does."""
    PartialState._reset_state()  # of the process that it was forked from
    outcome = call(*options)
    assert outcome.exit_code == 0, outcome.output
    assert PartialState().num_processes == 2
    assert outcome.stdout.count("report.md") == int(PartialState().is_main_process)


def test_two_processes_give_the_same_report(model, data, tmp_path):
    options = [f"--data={data}", f"--model={model}", f"--steps={STEPS}", "--device=cpu", "--offline"]
    assert call(*options, f"--output={tmp_path / 'one'}").exit_code == 0
    debug_launcher(one_of_two, ([*options, f"--output={tmp_path / 'two'}"],))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_bad_input_is_said_and_counted(data, predictions, tmp_path):
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    lines[0] = {"file_name": "0.png"}  # no ground truth
    (data / "1.npy").unlink()  # a missing file
    np.save(predictions / "2.npy", np.ones((12, 16), dtype=np.float32))  # another size
    (predictions / "3.npy").unlink()  # no prediction
    noisy = np.load(predictions / "4.npy")
    noisy[5, 5:8] = [np.nan, np.inf, -np.inf]
    np.save(predictions / "4.npy", noisy)
    lines.append({"file_name": "4.jpg", "depth_file_name": "4mm.npy"})  # millimetres taken for metres
    Image.new("RGB", SIZE[::-1]).save(data / "4.jpg")
    lines[4]["file_name"] = "five.png"
    shutil.copy(data / "4.png", data / "five.png")
    shutil.copy(predictions / "4.npy", predictions / "five.npy")
    np.save(data / "4mm.npy", 1000 * truth(4))
    write_lines(data, lines)

    report = score(data, predictions, tmp_path / "run")
    assert report["counts"]["frames_by_status"] == {"no ground truth": 1, "failed": 3, "scored": 2}
    assert {frame["name"]: frame["status"] for frame in report["left_out"]} == {
        "0": "no ground truth", "1": "failed", "2": "failed", "3": "failed",
    }  # fmt: skip
    reasons = [frame["reason"] for frame in report["left_out"]]
    assert reasons[0] == "0: no pixel has true depth that counts (768 missing)"
    assert reasons[1].endswith("1.npy: no such file")
    assert reasons[2] == "2: prediction 2.npy of 16x12 pixels for a picture of 32x24; resize it first"
    assert reasons[3].startswith("3: no prediction 3")
    warnings = report["warnings"]
    assert warnings[0] == "five: 3 of 759 predictions are NaN or infinite; they count as errors"
    assert warnings[1].startswith("4: all true depth is above 1000 m, from")
    assert warnings[1].endswith("is it in millimetres? Check the scale of the files.")
    assert report["mean"]["images"] == 2
    assert report["mean"]["nonfinite"] == 6
    page = (tmp_path / "run" / "report.md").read_text()
    assert "2 of 6" in page
    assert all(text in page for text in [*reasons, *warnings])
    with (tmp_path / "run" / "frames.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)].count("failed") == 3

    outcome = call("--data", data, "--predictions", predictions, "--output", tmp_path / "run")
    assert outcome.exit_code == 1
    assert sum(line.startswith("error: ") for line in outcome.stderr.splitlines()) == 3
    assert "3 of 6 frames failed, 2 are scored." in outcome.stderr

    np.save(data / "1.npy", truth(1))  # mended: only what failed is tried again
    assert score(data, predictions, tmp_path / "run")["counts"]["frames_by_status"]["scored"] == 3


def test_other_predictions_are_another_run(data, predictions, tmp_path):
    before = score(data, predictions, tmp_path / "run")
    assert score(data, predictions, tmp_path / "run") == before
    np.save(predictions / "1.npy", truth(2))
    with pytest.raises(ValueError, match=r"other settings \(predictor\.files_sha256"):
        score(data, predictions, tmp_path / "run")


def test_a_prediction_that_cannot_be_aligned_is_wrong_everywhere(data, predictions, tmp_path):
    np.save(predictions / "0.npy", np.full(SIZE, np.nan, dtype=np.float32))
    report = score(data, predictions, tmp_path / "run")
    assert report["frames"][0]["metrics"]["abs_rel"] == 1
    assert report["frames"][0]["metrics"]["delta3"] == 0
    assert report["warnings"] == [
        "0: scored as missing everywhere: the prediction is finite at none of 759 pixels with true depth"
    ]
    assert report["worst"][0]["name"] == "0"


def test_metric_predictions_of_the_wrong_scale(data, tmp_path):
    (tmp_path / "mm").mkdir()
    for number in range(5):
        np.save(tmp_path / "mm" / f"{number}.npy", 1000 * (truth(number) + 1))
    report = score(data, tmp_path / "mm", tmp_path / "run", alignment="none")
    assert report["warnings"][0] == "0: all predicted depth is above 1000 m: is it in millimetres?"
    assert len(report["warnings"]) == 5


def test_negative_aligned_depth(data, tmp_path):
    """Ours an error, MoGe's code a hit, Marigold's clipped to the range of the benchmark."""
    (tmp_path / "p").mkdir()
    for number in range(5):
        depth = truth(number)
        depth[-1] = -depth[-1]
        np.save(tmp_path / "p" / f"{number}.npy", depth)
    runs_by = {
        name: score(data, tmp_path / "p", tmp_path / name, "none", negative=name) for name in ("error", "hit", "clip")
    }
    share = 32 / (24 * 32 - 9)
    delta = {name: report["mean"]["delta1"] for name, report in runs_by.items()}
    assert delta["hit"] == 1
    assert delta["error"] == delta["clip"] == pytest.approx(1 - share)
    assert runs_by["error"]["mean"]["abs_rel"] == pytest.approx(2 * share)
    assert runs_by["clip"]["mean"]["abs_rel"] == pytest.approx(share, rel=1e-5)
    assert Protocol("nyuv2", "none", negative="clip").align(np.array([[-1.0, 20]]), np.array([[1.0, 1]]))[
        0
    ].tolist() == [[1e-3, 10]]


@pytest.mark.parametrize("suffix", [".npy", ".exr", ".png"])
def test_predictions_in_any_depth_file(data, predictions, tmp_path, suffix):
    (tmp_path / "other").mkdir()
    for number in range(5):
        write_depth(tmp_path / "other" / f"{number}{suffix}", np.load(predictions / f"{number}.npy"))
    expected = score(data, predictions, tmp_path / "a")["mean"]["abs_rel"]
    tolerance = 1e-3 if suffix == ".png" else 1e-9
    assert score(data, tmp_path / "other", tmp_path / "b")["mean"]["abs_rel"] == pytest.approx(expected, rel=tolerance)


def test_values_of_predictions_are_taken_as_they_are(tmp_path):
    """Relative depth and disparity may be 0 or negative; only NaN and infinity are no values."""
    np.save(tmp_path / "a.npy", np.array([[[-1, 0, np.nan, np.inf]]], dtype=np.float16))
    np.testing.assert_array_equal(read_values(tmp_path / "a.npy"), [[-1, 0, np.nan, np.nan]])
    write_depth(tmp_path / "a.png", np.array([[0, 1, 2]]))
    np.testing.assert_allclose(read_values(tmp_path / "a.png"), [[np.nan, 1, 2]], rtol=1e-4)
    np.testing.assert_allclose(read_values(tmp_path / "a.png", zero_is_value=True), [[0, 1, 2]], rtol=1e-4)
    np.save(tmp_path / "a.npy", np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"a\.npy: depth of shape \(2, 3, 4\) is no depth map"):
        read_values(tmp_path / "a.npy")


def test_disparity(pipe, data, predictions, tmp_path):
    (tmp_path / "disparity").mkdir()
    for number in range(5):
        depth = np.maximum(truth(number), 0.5)
        np.save(tmp_path / "disparity" / f"{number}.npy", 5 / depth - 3)
    assert score(data, tmp_path / "disparity", tmp_path / "a", "disparity")["mean"]["abs_rel"] < 1e-4

    predictor = ModelPredictor(pipe, {}, steps=STEPS, disparity=True)
    report = evaluate(
        Folder(data), Protocol("folder", "disparity"), predictor, tmp_path / "b", limit=2, save_predictions=True
    )
    again = score(data, tmp_path / "b" / "predictions", tmp_path / "c", "disparity", limit=2)
    assert again["mean"] == report["mean"]


def test_geometry_is_counted_where_the_camera_is_known(data, predictions, tmp_path):
    report = score(data, predictions, tmp_path / "run", geometry=True)
    assert math.isnan(report["mean"]["chamfer"])
    assert report["mean"]["chamfer_images"] == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["mean"]["chamfer"] is None

    camera = np.array([[30, 0, 15.5], [0, 30, 11.5], [0, 0, 1]])
    metrics = Protocol("folder", "none", geometry=True).score(truth(0) + 0.1 * (truth(0) > 0), truth(0), camera)
    assert 0 < metrics["chamfer"] < 0.2


def test_center_crop_is_what_the_model_sees(pipe, data, tmp_path):
    predictor = ModelPredictor(pipe, {}, steps=STEPS)
    protocol = Protocol("folder", center_crop=16)
    report = evaluate(Folder(data), protocol, predictor, tmp_path / "run", limit=2, save_predictions=True)
    assert np.load(tmp_path / "run" / "predictions" / "0.npy").shape == (16, 16)
    assert report["frames"][0]["metrics"]["pixels"] == 16 * 16


def test_published_results_stand_beside_the_same_protocol_alone(data, predictions, tmp_path):
    report = score(data, predictions, tmp_path / "run")
    assert not any(name in markdown(report) for name in PUBLISHED)
    report["protocol"]["benchmark"] = "moge-kitti"
    page = markdown(report)
    assert "| Marigold | 9.05 | 90.3 |" in page
    assert "| MoGe-2 | 3.75 | 98.1 |" in page
    for change, words in (
        ({"alignment": "median"}, "not by median"),
        ({"center_crop": 256}, "not of centre crops"),
        ({"benchmark": "nyuv2"}, "none are known"),
    ):
        page = markdown(report | {"protocol": report["protocol"] | change})
        assert words in page
        assert "Marigold" not in page
    report["counts"]["frames_of_the_data_set"] = 697
    assert "not all frames" in markdown(report)


def test_compare(data, predictions, tmp_path):
    worse = make_predictions(tmp_path / "worse", spread=0.1)
    score(data, predictions, tmp_path / "a")
    score(data, worse, tmp_path / "b")
    first, second = tmp_path / "a" / "report.json", tmp_path / "b" / "report.json"
    result = compare(first, second)["abs_rel"]
    by_frame = [
        [frame["metrics"]["abs_rel"] for frame in json.loads(path.read_text())["frames"]] for path in (first, second)
    ]
    assert result["difference"] == pytest.approx(np.mean(by_frame[1]) - np.mean(by_frame[0]))
    assert 0 < result["low"] < result["difference"] < result["high"]
    assert result["frames"] == 5
    assert "pixels" not in compare(first, second)
    assert compare(first, first)["abs_rel"]["high"] == 0

    printed = CliRunner().invoke(cli.app, ["compare", str(first), str(second)])
    assert printed.exit_code == 0
    assert f"{result['difference']:+.4f}" in printed.stdout

    score(data, worse, tmp_path / "median", "median")
    with pytest.raises(ValueError, match=r"other protocols .* alignment 'robust' and 'median'"):
        compare(first, tmp_path / "median" / "report.json")
    (worse / "2.npy").unlink()
    score(data, worse, tmp_path / "fewer")
    with pytest.raises(ValueError, match=r"other frames .* 1 are scored in the first only \['2'\], 0 in the second"):
        compare(first, tmp_path / "fewer" / "report.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is no report\.json"):
        compare(first, tmp_path / "x.json")


def test_the_bootstrap_interval_covers_the_mean():
    """In about 95 % of repetitions; of 200 that is 181 to 199 with a probability of 99.9 %."""
    from mf_diffusers.evaluation import comparison

    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        first = rng.normal(size=50)
        result = comparison._compare([first, first + 0.3 + rng.normal(size=50)], 0.95, seed)
        covered += result["low"] <= 0.3 <= result["high"]
    assert 178 <= covered <= 199


def test_command_errors_are_one_line(data, tmp_path):
    for arguments, words in (
        (["--data", data], "nothing to score"),
        (["--data", tmp_path / "nowhere", "--predictions", data], "metadata.jsonl: no such file"),
        (["--data", data, "--predictions", tmp_path / "nowhere"], "no such folder of predictions"),
    ):
        outcome = call(*arguments, "--output", tmp_path / "run")
        assert outcome.exit_code == 1
        assert outcome.stderr.startswith("error: ")
        assert words in outcome.stderr
    outcome = call("--data", data, "--predictions", tmp_path, "--output", tmp_path / "run")
    assert outcome.exit_code == 1
    assert "5 of 5 frames failed, 0 are scored" in outcome.stderr


def test_weights_hash_sees_every_weight():
    pipe = make_pipeline()
    before = weights_hash(pipe)
    assert weights_hash(make_pipeline()) == before
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 1
    assert weights_hash(pipe) != before


def test_frechet_distance():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(300, 6)), 1 + rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    from scipy.linalg import sqrtm

    covariances = np.cov(first.T), np.cov(second.T)
    offset = first.mean(axis=0) - second.mean(axis=0)
    expected = offset @ offset + np.trace(sum(covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1])).real
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, first + 2) == pytest.approx(6 * 4)
    few = rng.normal(size=(4, 50))  # no full rank
    assert frechet_distance(few, few + 1) == pytest.approx(50)
    assert frechet_distance([[0.0], [2]], [[0.0], [4]]) == pytest.approx(1 + (np.sqrt(2) - np.sqrt(8)) ** 2)
    for other in (first[:, :3], first[0], first[:1], first * np.nan):
        with pytest.raises(ValueError, match="features"):
            frechet_distance(first, other)


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory):
    """A tiny random Depth Anything, of disparity."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("depth_anything")
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, patch_size=14, neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, head_hidden_size=8,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 28, "width": 28}, ensure_multiple_of=14).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def frames_of(count):
    rng = np.random.default_rng(0)
    return [Frame(str(k), rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8), truth(k)) for k in range(count)]


def test_depth_following_and_consistency(depth_anything, pipe):
    image, depth = Image.fromarray(frames_of(1)[0].image), truth(0)
    perfect = DepthEstimator(lambda image: 7 / np.maximum(depth, 0.1) + 2, disparity=True)
    assert depth_following(image, depth, perfect)["abs_rel"] < 1e-5
    assert joint_consistency(image, depth, perfect)["abs_rel"] < 1e-5
    moved = DepthEstimator(lambda image: 3 * depth + 1, disparity=False)
    assert depth_following(image, depth, moved)["abs_rel"] < 1e-6
    assert joint_consistency(image, depth, moved)["abs_rel"] < 1e-6
    # The estimate is the truth: where it sees nothing is left out, not where the depth that was made is 0.
    assert joint_consistency(image, depth, moved)["pixels"] == SIZE[0] * SIZE[1]

    anything = DepthEstimator.from_transformers(depth_anything)
    assert anything.disparity
    assert anything.estimate(image).shape == SIZE
    assert np.isfinite(depth_following(image, depth, anything)["abs_rel"])
    ours = DepthEstimator.from_pipeline(pipe, steps=STEPS)
    assert not ours.disparity
    assert joint_consistency(image, depth, ours)["pixels"] == SIZE[0] * SIZE[1]


def test_scores_of_depth_to_image(depth_anything, dino, tmp_path):
    frames = frames_of(4)
    images = [Image.fromarray(255 - frame.image) for frame in frames]
    features = VisionFeatures(dino, batch_size=3)
    assert features(images).shape == (4, 16)
    np.testing.assert_allclose(features(images)[3], features(images[3:])[0], rtol=1e-5)
    estimator = DepthEstimator.from_transformers(depth_anything)
    scores = depth_to_image_scores(frames, images, estimator, features)
    assert scores["images"] == 4
    assert scores["frechet_distance"] > 0
    same = depth_to_image_scores(frames, [Image.fromarray(f.image) for f in frames], estimator, features)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6)


LAYOUTS = {
    "MoGe": ("{}/depth.exr", "depth"),
    "MoGe's baselines": ("{}/depth_affine_invariant.exr", "depth"),
    "Marigold": ("depth_npy/{}_depth.npy", "depth"),
    "Marigold before 2025": ("depth_npy/{}_pred.npy", "depth"),
    "Depth Anything": ("{}_raw_depth_meter.npy", "depth"),
    "Depth Pro": ("{}.npz", "depth"),
    "PFM": ("{}.pfm", "depth"),
    "MoGe's disparity": ("{}/disparity.exr", "disparity"),
    "Monodepth2": ("{}_disp.npy", "disparity"),
    "Depth Anything, relative": ("{}.npy", "disparity"),
}


def write_values(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".exr":
        OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, {"Y": values}).write(
            str(path)
        )
    elif path.suffix == ".npz":
        np.savez(path, depth=values, focallength_px=50.0)
    elif path.suffix == ".pfm":
        path.write_bytes(b"Pf\n%d %d\n-1\n" % values.shape[::-1] + values[::-1].astype("<f4").tobytes())
    else:
        np.save(path, values)


@pytest.mark.parametrize("layout, kind", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layouts_of_other_programs_are_found(data, tmp_path, layout, kind):
    """Beside them lie the pictures for the eye that these programs write, and that are no predictions."""
    disparity = kind == "disparity"
    for number in range(5):
        depth = 0.3 * np.maximum(truth(number), 0.5)
        write_values(tmp_path / "p" / layout.format(number), 1 / depth - 0.1 if disparity else depth)
        Image.new("RGB", (70, 24), "red").save(tmp_path / "p" / f"{number}.png")
    report = score(data, tmp_path / "p", tmp_path / "run", "disparity" if disparity else "scale")
    assert report["counts"]["frames_by_status"] == {"scored": 5}
    assert report["mean"]["abs_rel"] < 1e-4
    assert [frame["file"] for frame in report["frames"]] == [layout.format(number) for number in range(5)]


def test_disparity_is_not_taken_for_depth(data, tmp_path):
    for number in range(5):
        write_values(tmp_path / "p" / f"{number}_disp.npy", 1 / np.maximum(truth(number), 0.5))
    report = score(data, tmp_path / "p", tmp_path / "run")
    assert report["counts"]["frames_by_status"] == {"failed": 5}
    assert report["left_out"][0]["reason"] == (
        "0: prediction 0_disp.npy is disparity: score it with alignment='disparity'"
    )
    outcome = call("--data", data, "--predictions", tmp_path / "p", "-o", tmp_path / "line", "-q")
    assert "error: 0: prediction 0_disp.npy is disparity: score it with --alignment 'disparity'" in outcome.stderr
    write_values(tmp_path / "p" / "0" / "depth.npy", truth(0))  # where both are, the one that is meant
    write_values(tmp_path / "p" / "0" / "disparity.npy", 1 / np.maximum(truth(0), 0.5))
    for alignment, file in (("scale", "0/depth.npy"), ("disparity", "0/disparity.npy")):
        frame = score(data, tmp_path / "p", tmp_path / alignment, alignment, limit=1)["frames"][0]
        assert frame["file"] == file
        assert frame["metrics"]["abs_rel"] < 1e-4


@pytest.mark.parametrize("bits, mode", [(16, None), (8, None), (8, "RGB")])
def test_predictions_whose_level_0_is_a_value(data, tmp_path, bits, mode):
    """As Marigold's and Depth Anything's, which spread what they predict over all levels."""
    (tmp_path / "p").mkdir()
    for number in range(5):
        depth = np.maximum(truth(number), truth(number)[3:].min())
        share = (depth - depth.min()) / np.ptp(depth)
        levels = (share * (2**bits - 1)).astype(np.uint16 if bits == 16 else np.uint8)
        Image.fromarray(levels).convert(mode).save(tmp_path / "p" / f"{number}.png")
    missing = score(data, tmp_path / "p", tmp_path / "a")
    assert missing["mean"]["nonfinite"] > 0
    options = ["--data", data, "--predictions", tmp_path / "p", "--output", tmp_path / "b"]
    assert call(*options, "--zero-is-value").exit_code == 0
    value = json.loads((tmp_path / "b" / "report.json").read_text())
    assert value["mean"]["nonfinite"] == 0
    assert value["mean"]["abs_rel"] < (1e-3 if bits == 16 else 1e-2) < missing["mean"]["abs_rel"] * 10
    assert value["predictor"]["zero_is_value"]
    assert call(*options).exit_code == 1  # another run


def nested_data(path):
    """Frames in folders, as the benchmarks have them."""
    make_data(path)
    lines = []
    for number in range(5):
        (path / f"scene{number}" / "cam").mkdir(parents=True)
        for suffix in (".png", ".npy"):
            (path / f"{number}{suffix}").rename(path / f"scene{number}" / "cam" / f"0{suffix}")
        lines.append({f"{kind}file_name": f"scene{number}/cam/0{suffix}" for kind, suffix in KINDS})
    write_lines(path, lines)
    return path


KINDS = (("", ".png"), ("depth_", ".npy"))


def test_views_are_written_for_other_programs_and_their_predictions_found(tmp_path):
    data, views = nested_data(tmp_path / "data"), tmp_path / "views"
    outcome = call("--data", data, "--center-crop", 16, "--save-views", views)
    assert outcome.exit_code == 0
    assert sorted(path.name for path in views.iterdir()) == [f"scene{number}--cam--0.png" for number in range(5)]
    frame = Folder(data)[2]
    view, _ = Protocol("folder", center_crop=16).view(frame)
    with Image.open(views / "scene2--cam--0.png") as picture:
        assert np.array_equal(np.asarray(picture), view.image)

    for number, path in enumerate(sorted(views.iterdir())):
        view, _ = Protocol("folder", center_crop=16).view(Folder(data)[number])
        write_values(tmp_path / "p" / "depth_npy" / f"{path.stem}_depth.npy", np.maximum(view.depth, 0.5))
    report = score(data, tmp_path / "p", tmp_path / "run", "scale", center_crop=16)
    assert report["mean"]["abs_rel"] < 1e-6
    assert report["mean"]["images"] == 5

    shutil.rmtree(data / "scene3")
    outcome = call("--data", data, "--save-views", tmp_path / "some", "--limit", 4)
    assert outcome.exit_code == 1
    assert "error: scene3/cam/0: " in outcome.stderr
    assert len(list((tmp_path / "some").iterdir())) == 3


def test_views_of_one_name_are_refused(data, tmp_path):
    (data / "a").mkdir()
    for name in ("a--b.png", "a/b.png"):
        shutil.copy(data / "0.png", data / name)
    write_lines(data, [{"file_name": name} for name in ("a--b.png", "a/b.png")])
    outcome = call("--data", data, "--save-views", tmp_path / "views")
    assert outcome.exit_code == 1
    assert "error: 1 frames have the same file name with -- for /: ['a--b']" in outcome.stderr


def test_compare_takes_disparity_against_depth(data, predictions, tmp_path):
    for number in range(5):
        write_values(tmp_path / "p" / f"{number}_disp.npy", 2 / np.maximum(truth(number), 0.5) + 1)
    first = score(data, predictions, tmp_path / "a")
    second = score(data, tmp_path / "p", tmp_path / "b", "disparity")
    reports = [tmp_path / run / "report.json" for run in "ab"]
    with pytest.warns(InputWarning, match=r"a.report\.json are aligned by robust, those of .*json by disparity"):
        row = compare(*reports)["abs_rel"]
    assert row["difference"] == pytest.approx(second["mean"]["abs_rel"] - first["mean"]["abs_rel"])
    assert row["high"] < 0
    printed = CliRunner().invoke(cli.app, ["compare", *map(str, reports)])
    assert printed.exit_code == 0
    assert "warning: the predictions of" in printed.stderr
    score(data, tmp_path / "p", tmp_path / "c", "disparity", center_crop=16)
    with pytest.raises(ValueError, match=r"other protocols .* center_crop None and 16"):
        compare(reports[0], tmp_path / "c" / "report.json")


def test_a_warning_of_depth_names_what_metadata_calls_the_remedy(data, predictions, tmp_path):
    """Once, though the frame is read again for its picture in the report; and -q does not hide it."""
    depth = np.load(data / "0.npy")
    depth[0] = 1e10
    np.save(data / "0.npy", depth)
    outcome = call("--data", data, "--predictions", predictions, "-o", tmp_path / "run", "-q")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr.count("hold 1e+10") == 1
    assert "give depth_infinite 1e+10 if it is infinitely far, depth_max inf if" in outcome.stderr
