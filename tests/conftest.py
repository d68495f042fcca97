"""Fixtures of all tests: a tiny pipeline, the reference tensors, attention that ends with its test."""

from pathlib import Path

import pytest
import torch
from diffusers import attention_backend
from tiny import make_pipeline

from mf_diffusers import ModalityForcingPipeline


torch.set_num_threads(1)  # tiny tensors: threads only wait for one another
pytest.register_assert_rewrite(
    "training_runs", "sharded_runs", "evaluation_runs", "comfyui_models"
)  # plugins that tests import from


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m comfyui` is for ComfyUI's environment, which may lack what the other tests need."""
    if config.option.markexpr == "comfyui" and collection_path.name.startswith("test_"):
        return "mark.comfyui" not in collection_path.read_text(encoding="utf-8") or None
    return None


@pytest.fixture(autouse=True)
def own_attention():
    """Lets a test's `set_attention_backend`, which holds for all models of a process, end with the test."""
    with attention_backend("native"):
        yield


@pytest.fixture
def pipe() -> ModalityForcingPipeline:
    pipeline = make_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def golden_a() -> Path:
    """Folder of reference tensors of the published implementation, see its README."""
    return Path(__file__).parent / "golden_a"


@pytest.fixture(scope="session")
def golden_autoencoder() -> Path:
    """The same folder with the autoencoder's tensors, which are not part of the project."""
    folder = Path(__file__).parents[2] / "shared" / "reference" / "golden_a"
    if not folder.is_dir():
        pytest.skip("the autoencoder's reference tensors are not on this machine")
    return folder
