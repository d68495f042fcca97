"""The face of the package: light to import, and known to diffusers whichever is imported first."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mf_diffusers


HEAVY = ("torch", "diffusers", "transformers", "scipy.optimize", "trimesh", "matplotlib")


def python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import mf_diffusers",
        "import mf_diffusers.depth_io, mf_diffusers.geometry",
        "import mf_diffusers.evaluation.protocol, mf_diffusers.datasets",
        *(
            f"from typer.testing import CliRunner; from mf_diffusers.cli import app; CliRunner().invoke(app, {call})"
            for call in (["--help"], ["depth", "--help"])
        ),
    ],
)
def test_what_needs_no_model_loads_no_model_library(code):
    assert python(f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_names_for_type_checkers_are_those_that_can_be_imported():
    tree = ast.parse(Path(mf_diffusers.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for statement in block.body for alias in statement.names}
    assert seen == set(mf_diffusers.__all__) <= set(dir(mf_diffusers))
    for name in mf_diffusers.__all__:
        assert getattr(mf_diffusers, name).__name__ == name
    with pytest.raises(AttributeError, match="'mf_diffusers' has no attribute 'Nothing'"):
        mf_diffusers.Nothing  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import mf_diffusers; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import mf_diffusers",
        "import importlib, mf_diffusers; importlib.reload(mf_diffusers); from diffusers import DiffusionPipeline",
        # How other libraries look whether diffusers is there; it is not imported by that.
        "import importlib.util, mf_diffusers; importlib.util.find_spec('diffusers'); "
        "from diffusers import DiffusionPipeline",
    ],
)
def test_diffusers_knows_the_classes_in_every_order_of_imports(imports, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    printed = python(
        f"{imports}; import diffusers\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})\n"
        "parts = (pipe, pipe.transformer, pipe.depth_processor, diffusers.FluxPipeline)\n"
        "print(*(part.__module__ for part in parts), hasattr(diffusers, 'Nothing'))"
    )
    ours = [f"mf_diffusers.modality_forcing.{name}" for name in ("pipeline", "transformer_flux2", "depth_processor")]
    assert printed.split() == [*ours, "diffusers.pipelines.flux.pipeline_flux", "False"]


def test_auto_model_and_single_files_work_without_the_pipeline(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    pipe.transformer.save_published(tmp_path / "published.safetensors")
    printed = python(
        "import mf_diffusers; from diffusers import AutoModel, ModalityForcingFlux2Transformer2DModel as Model\n"
        f"print(type(AutoModel.from_pretrained({str(tmp_path / 'transformer')!r})) is Model)\n"
        f"path, config = {str(tmp_path / 'published.safetensors')!r}, {str(tmp_path / 'transformer')!r}\n"
        "print(Model.from_single_file(path, config=config, subfolder='').num_parameters())"
    )
    assert printed.split() == ["True", str(pipe.transformer.num_parameters())]


def test_version():
    printed = subprocess.run([sys.executable, "-m", "mf_diffusers.cli", "--version"], capture_output=True, text=True)
    assert printed.stdout == f"mf-diffusers {mf_diffusers.__version__}\n"
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert re.search(r'^version = "(.+)"', pyproject.read_text(), re.MULTILINE)[1] == mf_diffusers.__version__
