"""The pack's nodes, as ComfyUI asks for them."""

from comfy_api.latest import ComfyExtension, io

from . import depth_nodes, latent_nodes, loader_nodes


NODES = [
    loader_nodes.LoadPipeline,
    loader_nodes.LoadAdapter,
    loader_nodes.LoadScene,
    latent_nodes.EmptyLatent,
    latent_nodes.Encode,
    latent_nodes.Trajectory,
    latent_nodes.Decode,
    latent_nodes.Split,
    latent_nodes.Join,
    depth_nodes.LoadDepth,
    depth_nodes.DepthPicture,
    depth_nodes.DepthPoints,
    depth_nodes.DepthMask,
    depth_nodes.EnsembleDepth,
]


class ModalityForcingExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ModalityForcingExtension:
    return ModalityForcingExtension()
