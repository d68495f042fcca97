"""Tiny instances of the real classes, with random weights."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, attention_backend
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mf_diffusers import DepthProcessor, ModalityForcingFlux2Transformer2DModel, ModalityForcingPipeline
from mf_diffusers.modality_forcing.depth_processor import contract


torch.set_num_threads(1)  # tiny tensors: threads only wait for one another

TINY_TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (4, 4, 4, 4),
    "depth_channels": 16,
    "num_depth_decoder_layers": 1,
}
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m comfyui` is for ComfyUI's environment, which may lack what the other tests need."""
    if config.option.markexpr == "comfyui" and collection_path.name.startswith("test_"):
        return "mark.comfyui" not in collection_path.read_text(encoding="utf-8") or None
    return None


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Moves parameters that start at zero (mixers, heads) away from it, so that every path counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def make_tokenizer() -> Qwen2TokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
    )


def make_pipeline(**transformer_kwargs) -> ModalityForcingPipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return ModalityForcingPipeline(
        transformer=randomize(ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER | transformer_kwargs)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)),
        depth_scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.1)),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        depth_processor=DepthProcessor(patch_size=4),
        text_encoder_out_layers=(1, 2, 3),
        max_sequence_length=64,
        default_sample_size=32,
    )


def close_depth(ours, other, atol: float = 1e-5) -> bool:
    """Whether depth maps are alike in what the model makes, contracted depth: of depth near 0, or of depth far away, a
    relative bound asks for more than its products have, and processors differ."""
    return torch.allclose(*(contract(torch.as_tensor(depth)) for depth in (ours, other)), rtol=0, atol=atol)


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
