"""What a user sees of errors: one line, in the words of the program that was called."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import make_pipeline
from typer.main import get_command

from mf_diffusers.cli import app
from mf_diffusers.commands.options import FLAGS
from mf_diffusers.errors import errors_as_lines, one_line, with_options


OPTIONS = {"model": "--model", "num_inference_steps": "--steps", "overwrite": "--overwrite", "key": "--depth-key"}


@pytest.mark.parametrize(
    "message, line",
    [
        ("model=in/x has no weights", "--model in/x has no weights"),
        ("`num_inference_steps` must be at least 1, got 0.", "--steps must be at least 1, got 0."),
        ("it exists: give overwrite=True.", "it exists: give --overwrite."),
        ("key='Z' picks from an .exr", "--depth-key 'Z' picks from an .exr"),
        ("name one of them with key=...", "name one of them with --depth-key ..."),
        ("a model of shape=(2, 3) and a `shape`", "a model of shape=(2, 3) and a `shape`"),
        ("the monkey=x and remodel=y", "the monkey=x and remodel=y"),
    ],
)
def test_arguments_are_called_by_their_flags(message, line):
    assert with_options(message, OPTIONS) == line


def test_flags_are_those_of_the_commands():
    commands = get_command(app).commands.values()
    known = {name for command in commands for p in command.params for name in (*p.opts, p.name.upper())}
    assert set(FLAGS.values()) <= known


def test_an_error_becomes_one_line_and_others_stay(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended, errors_as_lines(OPTIONS):
        raise ValueError("model=x is\n  no model")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: --model x is no model\n"
    with pytest.raises(KeyError), errors_as_lines():
        raise KeyError("a fault of the program")
    with pytest.raises(SystemExit) as ended, errors_as_lines():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MF_DIFFUSERS_DEBUG", "1")
    with pytest.raises(ValueError), errors_as_lines():
        raise ValueError("shows where it comes from")


def test_the_source_is_named_once():
    assert one_line(ValueError("is broken"), "a.png") == "a.png: is broken"
    assert one_line(ValueError("a.png: is broken"), "a.png") == "a.png: is broken"
    assert one_line(FileNotFoundError(2, "No such file", "a.png"), Path("a.png")) == "a.png: No such file"


# The program as it is called


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures: of a plain name, of one that Windows forbids, of Japanese, and of one that is no UTF-8."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"a.png", b"b:c?.png", "犬.png".encode(), b"z\xe9.png"):
        Image.fromarray(pixels).save(folder / os.fsdecode(name))
    return folder


def start(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "mf_diffusers.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell has jobs in the background ignore interruptions, and so would the tests of such a job.
    heeds_interruptions = partial(signal.signal, signal.SIGINT, signal.SIG_DFL) if os.name == "posix" else None
    return subprocess.Popen(command, cwd=cwd, env=os.environ | environment, preexec_fn=heeds_interruptions, **pipes)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have such names")
@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_no_name_fails_a_run_whatever_stdout_can_print(model, photos, tmp_path, encoding):
    run = start("depth", photos, "-m", model, "--steps", 1, "--no-points", cwd=tmp_path, PYTHONIOENCODING=encoding)
    printed, complaints = run.communicate()
    assert run.returncode == 0, complaints
    names = {os.fsencode(path.name) for path in (tmp_path / "outputs").iterdir()}
    assert names == {b"a", b"b-c-", "犬".encode(), b"z\xe9"}
    assert len(printed.splitlines()) == 4
    if encoding == "utf-8":
        assert {os.path.basename(line) for line in printed.splitlines()} == names
    for path in (tmp_path / "outputs").iterdir():
        noted = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        assert Path(noted["input"]["path"]).is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interruption_ends_quietly_and_keeps_what_is_finished(model, photos, tmp_path):
    run = start("depth", *[photos / "a.png"] * 500, "-m", model, "--steps", 1, "--no-points", cwd=tmp_path)
    first = run.stdout.readline()
    run.send_signal(signal.SIGINT)
    printed, complaints = run.communicate()
    assert run.returncode == 130
    assert b"Traceback" not in complaints and b"error" not in complaints
    finished = (first + printed).decode().split()
    assert 1 <= len(finished) < 500
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {Path(path).name for path in finished}
    assert all((tmp_path / path / "metadata.json").is_file() for path in finished)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_closed_pipe_ends_quietly(model, photos, tmp_path):
    run = start("depth", photos, "-m", model, "--steps", 1, "--no-points", cwd=tmp_path)
    run.stdout.close()
    complaints = run.stderr.read().decode()
    assert run.wait() == 1
    assert not re.search("Traceback|error|Exception|Aborted", complaints)
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["a"]
