"""Depth completion as a benchmark: what is given, the readers, the methods to compare with, and the report."""

import json

import numpy as np
import pytest
from dataset_files import write_picture, write_png16
from evaluation_runs import STEPS, call, truth
from tiny import make_pipeline

from mf_diffusers.alignment import align_scale
from mf_diffusers.datasets.completion import KITTICompletion, SparseFolder
from mf_diffusers.datasets.folder import Folder
from mf_diffusers.datasets.frame import Frame
from mf_diffusers.depth_io import write_depth
from mf_diffusers.evaluation.metrics import completion_metrics, depth_metrics
from mf_diffusers.evaluation.predictors import InterpolationPredictor, ModelPredictor, interpolated
from mf_diffusers.evaluation.protocol import Protocol
from mf_diffusers.evaluation.run import evaluate


pytest_plugins = ["evaluation_runs"]


def completion(benchmark="folder", **settings):
    return Protocol(benchmark, "none", task="completion", **settings)


def test_kitti(tmp_path):
    name = "2011_10_03_drive_0047_sync_{}_0000000761_image_02"
    pixels = write_picture(tmp_path / "image" / f"{name.format('image')}.png", 3, 2)
    write_png16(
        tmp_path / "groundtruth_depth" / f"{name.format('groundtruth_depth')}.png", [[0, 256, 2560], [1, 512, 300]]
    )
    write_png16(tmp_path / "velodyne_raw" / f"{name.format('velodyne_raw')}.png", [[0, 0, 2560], [0, 0, 0]])
    (tmp_path / "intrinsics").mkdir()
    (tmp_path / "intrinsics" / f"{name.format('image')}.txt").write_text("721.5 0 596.5 0 721.5 149.8 0 0 1")
    frames = KITTICompletion(tmp_path)
    assert frames.names == [name.format("image")]
    frame = frames[0]
    assert (frame.image == pixels).all()
    assert frame.depth.tolist() == [[0, 1, 10], [1 / 256, 2, 300 / 256]]
    assert frame.sparse.tolist() == [[0, 0, 10], [0, 0, 0]]
    assert frame.intrinsics[0].tolist() == [721.5, 0, 596.5]
    (tmp_path / "velodyne_raw" / f"{name.format('velodyne_raw')}.png").unlink()
    with pytest.raises(ValueError, match=r"velodyne_raw.*no such file"):
        frames[0]


def test_sparse_folder(tmp_path):
    for name in ("room/1.jpg", "2.png"):
        write_picture(tmp_path / "rgb" / name, 3, 2)
    for kind in ("sparse", "gt"):
        write_png16(tmp_path / kind / "room" / "1.png", [[256, 0, 512], [0, 0, 0]])
    write_depth(tmp_path / "sparse" / "2.png", np.array([[0, 0, 3], [0, 0, 0]]))  # notes its scale
    np.save(tmp_path / "gt" / "2.npy", np.full((2, 3), 3.0))
    frames = SparseFolder(tmp_path)
    assert [frames[i].name for i in range(2)] == ["2", "room/1"]
    assert frames[1].sparse.tolist() == frames[1].depth.tolist() == [[1, 0, 2], [0, 0, 0]]
    np.testing.assert_allclose(frames[0].sparse, [[0, 0, 3], [0, 0, 0]], rtol=1e-4)
    (tmp_path / "sparse" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"no depth file .*sparse/2"):
        frames[0]


def frame_of(depth, sparse=None, name="a"):
    return Frame(name, np.zeros((*depth.shape, 3), np.uint8), depth, sparse=sparse)


def test_what_is_given():
    depth = truth(0)
    given = completion(points=50).view(frame_of(depth))[0].sparse
    known = given > 0
    assert known.sum() == 50 and (given[known] == depth[known]).all()
    assert (completion(points=50).view(frame_of(depth))[0].sparse == given).all()
    assert (completion(points=50).view(frame_of(depth, name="b"))[0].sparse != given).any()
    assert (completion(density=0.1).view(frame_of(depth))[0].sparse > 0).sum() == round(0.1 * (depth > 0).sum())
    assert (completion(points=50, center_crop=16).view(frame_of(depth))[0].sparse > 0).sum() == 50
    assert ((completion(points=10**6).view(frame_of(depth))[0].sparse > 0) == (depth > 0)).all()

    own = np.where(given > 0, depth + 0.01, np.float32(0))
    assert (completion("sparse-folder").view(frame_of(depth, own))[0].sparse == own).all()
    part = completion("sparse-folder", points=7).view(frame_of(depth, own))[0].sparse
    assert (part > 0).sum() == 7 and (part[part > 0] == own[part > 0]).all()
    for crop in (None, 16):  # as a benchmark of image -> depth nothing is given
        assert Protocol("sparse-folder", center_crop=crop).view(frame_of(depth, own))[0].sparse is None


def test_a_frame_keeps_its_sparse_depth_in_step():
    depth = truth(0)
    sparse = np.where(np.arange(depth.size).reshape(depth.shape) % 97 == 50, depth, np.float32(0))
    frame = frame_of(depth, sparse)
    assert (frame.turned(1).sparse == np.rot90(sparse, -1)).all()
    small = frame.within(depth.size // 4)
    assert small.sparse.shape == small.depth.shape and (small.sparse > 0).sum() == (sparse > 0).sum()
    with pytest.raises(ValueError, match="sparse depth is"):
        frame_of(depth, sparse[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 5}, "are of depth completion"),
        ({"task": "completion", "points": 5}, "must be none, not robust"),
        ({"task": "completion", "alignment": "none"}, "brings no sparse depth"),
        ({"task": "completion", "alignment": "none", "points": 5, "density": 0.1}, "not both"),
        ({"task": "completion", "alignment": "none", "density": 0.0}, "a share above 0"),
        ({"task": "completion", "alignment": "none", "benchmark": "sparse-folder", "center_crop": 8}, "its own sparse"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"benchmark": "folder"} | settings)


def test_metrics_by_hand():
    prediction, true = np.array([[1.0, 4.0, 9.0]]), np.array([[2.0, 5.0, 0.0]])
    expected = {"mae": 1.0, "irmse": 1000 * np.sqrt((0.5**2 + 0.05**2) / 2)}
    assert completion_metrics(prediction, true) == pytest.approx(expected)
    assert completion_metrics(np.array([[np.nan, 5.0]]), np.array([[2.0, 5.0]]))["mae"] == 1.0


def test_interpolation():
    rows, columns = np.mgrid[:20, :30].astype(np.float32)
    plane = 1 + 0.1 * rows + 0.05 * columns
    sparse = np.zeros_like(plane)
    for at in ((0, 0), (0, 29), (19, 0), (19, 29), (7, 12)):
        sparse[at] = plane[at]
    np.testing.assert_allclose(interpolated(sparse), plane, rtol=1e-5)
    for kept in (1, 2):  # too few for a triangle: the nearest
        few = np.zeros_like(plane)
        few[5, :kept] = plane[5, :kept]
        assert set(interpolated(few).ravel()) == set(plane[5, :kept])
    line = np.zeros_like(plane)
    line[5, ::7] = plane[5, ::7]
    assert set(interpolated(line).ravel()) == set(plane[5, ::7])
    with pytest.raises(ValueError, match="nothing to interpolate"):
        interpolated(0 * plane)


def test_runs_of_the_methods(pipe, data, tmp_path):
    protocol = completion(points=40)
    methods = {
        "model": ModelPredictor(pipe, {}, steps=STEPS),
        "fitted": ModelPredictor(pipe, {}, steps=STEPS, fitted=True),
        "interpolation": InterpolationPredictor(),
    }
    reports = {}
    for name, predictor in methods.items():
        output = tmp_path / name
        reports[name] = evaluate(Folder(data), protocol, predictor, output, save_predictions=True)
        page = (output / "report.md").read_text()
        assert "# folder, completion, points 40" in page and "| RMSE, m | MAE, m | iRMSE, 1/km | REL, % |" in page
        assert "none are known" in page

    view, _ = protocol.view(Folder(data)[3])
    made = {name: np.load(tmp_path / name / "predictions" / "3.npy") for name in methods}
    known = view.sparse > 0
    assert (made["model"][known] == view.sparse[known]).all()
    scale = align_scale(made["fitted"], view.sparse, grid=None).scale
    assert scale == pytest.approx(1, rel=1e-5)
    expected = depth_metrics(made["model"], view.depth) | completion_metrics(made["model"], view.depth)
    assert reports["model"]["frames"][3]["metrics"] == pytest.approx(expected)
    errors = {name: report["mean"]["abs_rel"] for name, report in reports.items()}
    assert errors["interpolation"] < 0.1 < min(errors["model"], errors["fitted"])  # smooth depth, a random model
    with pytest.raises(ValueError, match="other settings"):
        evaluate(Folder(data), completion(points=41), methods["model"], tmp_path / "model")


def test_command(data, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "tiny")
    task = ["--data", data, "--task", "completion", "--points", "40"]
    for method, source in (("interpolation", []), ("fitted", ["--model", tmp_path / "tiny", "--steps", "1"])):
        outcome = call(*task, "--method", method, *source, "--output", tmp_path / method)
        assert outcome.exit_code == 0, outcome.output
        assert "RMSE, m" in outcome.stdout
        report = json.loads((tmp_path / method / "report.json").read_text())
        assert report["predictor"]["method"] == method
    outcome = call("--data", data, "--method", "fitted", "--output", tmp_path / "none")
    assert outcome.exit_code == 1 and "of depth completion" in outcome.stderr
