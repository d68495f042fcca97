"""What several nodes have in common: names, and their sockets."""

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker


CATEGORY = "Modality Forcing"
MODEL_TIP = "A Modality Forcing model, from 'Load Diffusion Model' or 'Load Modality Forcing Pipeline'."
RAW_DEPTH_TIP = "Raw depth, larger is farther. From 'Decode RGB-D', 'Load Depth', or a geometry of the core's nodes."
VALID_TIP = "1 where depth counts. Left out: wherever it is positive and finite."
MogeGeometry = io.Custom("MOGE_GEOMETRY")


def depth_input(tooltip: str = RAW_DEPTH_TIP, optional: bool = False):
    return io.MultiType.Input("depth", [io.Image, MogeGeometry], tooltip=tooltip, optional=optional)


def valid_input():
    return io.Mask.Input("valid", optional=True, tooltip=VALID_TIP)


def depth_outputs() -> list:
    return [
        io.Image.Output(
            display_name="depth",
            tooltip="Raw float depth, larger is farther: relative, about 1 in the mean; depth that was given has its "
            "own unit. To save it: EXR with input_color_space 'linear'. Previews clip it.",
        ),
        io.Mask.Output(display_name="valid", tooltip="1 where depth is valid, 0 in the sky and in holes."),
        MogeGeometry.Output(display_name="geometry", tooltip="The same depth where no preview or saver clips it."),
    ]


def blocked(node, output: int, message: str) -> ExecutionBlocker:
    """In place of an output that cannot be made. Raises ValueError where the graph wants it."""
    if any([node.hidden.unique_id, output] in consumer["inputs"].values() for consumer in node.hidden.prompt.values()):
        raise ValueError(message)
    return ExecutionBlocker(message)  # cached, it may be wanted later
