"""A ComfyUI server on a free port with a folder of its own, and prompts sent to it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]


class PromptError(Exception):
    """A node failed, or the graph did not validate: its message."""


class Server:
    """
    Args:
        comfyui: ComfyUI's folder.
        base: folder for models, inputs and outputs; this repository is linked into its custom_nodes.
    """

    def __init__(self, comfyui: Path, base: Path):
        for name in ("custom_nodes", "input", "output", "models/diffusers", "models/diffusion_models", "models/loras"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "mf_diffusers").symlink_to(REPOSITORY, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base, self.log = base, base / "server.log"
        command = [sys.executable, "main.py", "--cpu", "--port", self.port, "--base-directory", base]
        command += ["--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=comfyui,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def wait(self, seconds: float = 600):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            try:
                return self.get("/system_stats")
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not answer in {seconds} seconds:\n{self.log.read_text()[-3000:]}")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return json.load(response)

    def post(self, path: str, data: dict):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from error

    def run(self, graph: dict, seconds: float = 900) -> dict[str, list[Path]]:
        """
        Runs a graph in API format to its end.

        Returns:
            The files that each node wrote. Raises PromptError with the message of the node that failed.
        """
        prompt_id = self.post("/prompt", {"prompt": graph})["prompt_id"]
        end = time.monotonic() + seconds
        while not (history := self.get(f"/history/{prompt_id}")):
            if time.monotonic() > end:
                raise TimeoutError(f"The prompt runs for more than {seconds} seconds.")
            time.sleep(0.05)
        result = history[prompt_id]
        if result["status"]["status_str"] != "success":
            errors = [data for kind, data in result["status"]["messages"] if kind == "execution_error"]
            raise PromptError(f"{errors[0]['node_type']}: {errors[0]['exception_message']}")
        return {
            node: [
                self.base / file["type"] / file["subfolder"] / file["filename"]
                for files in outputs.values()
                for file in files
                if isinstance(file, dict) and "filename" in file
            ]
            for node, outputs in result["outputs"].items()
        }


class Graph:
    """Builds a graph in API format: every call adds a node; `node[i]` is its output i."""

    def __init__(self):
        self.nodes = {}

    def add(self, node_type: str, **inputs) -> "Node":
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": node_type, "inputs": inputs}
        return Node(name)


class Node:
    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, output: int) -> list:
        return [self.name, output]
