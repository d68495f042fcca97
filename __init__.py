"""This repository as a node pack of ComfyUI: clone it into custom_nodes/."""

import logging
import sys
from pathlib import Path

from comfyui_version import __version__ as comfyui_version


# Last in the search path: an installed mf_diffusers goes first, and nothing else is hidden.
sys.path.append(str(Path(__file__).parent))

from .comfyui_nodes import core


requirements = Path(__file__).with_name("requirements.txt")
states = [core.state_of_the_core(comfyui_version), core.state_of_the_packages(requirements)]
for _, lines in states:
    for line in lines:
        logging.warning(line)

if all(works for works, _ in states):
    from .comfyui_nodes import latents, model
    from .comfyui_nodes.nodes import comfy_entrypoint

    model.register()
    if core.serves(core.Z_IMAGE):
        from .comfyui_nodes import z_image

        z_image.register()
    latents.explain_streams()
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
else:
    NODE_CLASS_MAPPINGS = {}
    __all__ = ["NODE_CLASS_MAPPINGS"]

WEB_DIRECTORY = "./comfyui_nodes/web"
