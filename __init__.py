"""This repository as a node pack of ComfyUI: clone it into custom_nodes/."""

import sys
from pathlib import Path


# Last in the search path: an installed mf_diffusers goes first, and nothing else is hidden.
sys.path.append(str(Path(__file__).parent))

from .comfyui_nodes import model
from .comfyui_nodes.nodes import comfy_entrypoint


model.register()

WEB_DIRECTORY = "./comfyui_nodes/web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
