"""The context-parallel plans, on two CPU processes (Ulysses; ring attention needs kernels that only GPUs have)."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from tiny import TINY_DEPTH_DIT, TINY_TRANSFORMER, randomize
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import spawn

from mf_diffusers import ModalityForcingDiTTransformer2DModel, ModalityForcingFlux2Transformer2DModel
from mf_diffusers.modality_forcing.latent_tokens import position_ids


CONFIGS = {
    ModalityForcingFlux2Transformer2DModel: TINY_TRANSFORMER,
    ModalityForcingDiTTransformer2DModel: TINY_DEPTH_DIT,  # one key and value head, which processes cannot share
}


def worker(rank: int, port: int, model_class: type):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = randomize(model_class(**CONFIGS[model_class])).eval()
    inputs = {
        "hidden_states": torch.randn(2, 6, 16),
        "encoder_hidden_states": torch.randn(2, 4, model.config.joint_attention_dim),
        "timestep": torch.rand(2),
        "img_ids": position_ids(rows=2, columns=3),
        "txt_ids": position_ids(length=4),
        "depth_hidden_states": torch.randn(2, 6, 16),
        "depth_timestep": torch.rand(2),
        "depth_ids": position_ids(time=1, rows=2, columns=3),
        "return_dict": False,
    }
    with torch.no_grad():
        whole = model(**inputs)
        cp_config = ContextParallelConfig(ulysses_degree=2)
        config = ParallelConfig(context_parallel_config=cp_config)
        # enable_parallelism builds its mesh on an accelerator; the mesh is all that differs here.
        mesh = init_device_mesh("cpu", cp_config.mesh_shape, mesh_dim_names=cp_config.mesh_dim_names)
        config.setup(rank, 2, torch.device("cpu"), mesh=mesh)
        model._resolve_parallel_config = lambda _: config
        model.enable_parallelism(config=config)
        split = model(**inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, split))
    dist.barrier()
    time.sleep(1)  # the other process may still be reading from this one
    # Past the interpreter's shutdown, in which gloo's threads now and then abort a process that has done all its work.
    os._exit(0)


@pytest.mark.parametrize("model_class", CONFIGS)
def test_ulysses_on_two_processes(model_class):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(worker, (port, model_class), nprocs=2)
