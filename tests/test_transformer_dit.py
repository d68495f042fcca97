"""The from-scratch family: transformer, text-to-image base, graft, objective and pipeline."""

import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import (
    TINY_DEPTH_DIT,
    TINY_DIT,
    TINY_T5,
    close,
    close_depth,
    make_dit_pipeline,
    predict,
    randomize,
    transformer_inputs,
)
from training_runs import assert_it_learns
from transformers import T5Config, T5EncoderModel

from mf_diffusers import DepthProcessor, ModalityForcingDiTTransformer2DModel, ModalityForcingPipeline
from mf_diffusers.checkpoints import load_pipeline, read_checkpoint
from mf_diffusers.modality_forcing.latent_tokens import position_ids
from mf_diffusers.modality_forcing.noise import MIN_TIMESTEP, add_noise
from mf_diffusers.modality_forcing.objective import ObjectiveConfig, draw_noise, modality_forcing_loss


make_inputs = partial(transformer_inputs, 24)


CONFIGS = Path(__file__).parents[1] / "finetune" / "configs"
IMAGE = np.random.default_rng(0).random((40, 72, 3), dtype=np.float32)
DEPTH = 1 + np.random.default_rng(1).random((40, 72), dtype=np.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return randomize(ModalityForcingDiTTransformer2DModel(**TINY_DIT)).eval()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(ModalityForcingDiTTransformer2DModel(**TINY_DEPTH_DIT)).eval()


# Sizes


def read_transformer_config(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / f"dit_{name}.yaml"))["transformer"]


@pytest.mark.parametrize(
    ("name", "millions", "width", "layers"),
    [
        ("2m", 2, 128, 10),
        ("8m", 8, 256, 10),
        ("30m", 30, 512, 10),
        ("100m", 100, 768, 15),
        ("370m", 370, 1024, 30),
        ("800m", 800, 1536, 30),
        ("3_3b", 3300, 3072, 30),
    ],
)
def test_parameter_counts(name, millions, width, layers):
    config = read_transformer_config(name)
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
    with torch.device("meta"):
        base = ModalityForcingDiTTransformer2DModel(**config)
        depth_channels = 256 if config["in_channels"] == 128 else 64
        grafted = ModalityForcingDiTTransformer2DModel(**config, depth_channels=depth_channels)
    count, with_depth = base.num_parameters(), grafted.num_parameters()
    print(f"{name}: {count / 1e6:.1f}M parameters, {with_depth / 1e6:.1f}M with depth")  # shown by pytest -rP
    assert base.inner_dim == width and len(base.transformer_blocks) == layers
    assert base.transformer_blocks[0].attn.projection_dims[-1] == 2 * 3 * width
    assert abs(count / (1e6 * millions) - 1) <= 0.03


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"axes_dims_rope": (4, 4, 4, 4)}, "must add up to attention_head_dim, 8"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        ModalityForcingDiTTransformer2DModel(**TINY_DIT | config)


# The graft


def graft(base, **kwargs):
    return ModalityForcingDiTTransformer2DModel.from_base(base, **{"depth_channels": 16} | kwargs).eval()


def test_without_depth_a_graft_is_its_base(base):
    expected, _ = predict(base, make_inputs(depth=False))
    sample, depth_sample = predict(graft(base), make_inputs(depth=False))
    assert torch.equal(sample, expected) and depth_sample is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graft_keeps_the_base(base, dtype):
    base.to(dtype)
    before = copy.deepcopy(base.state_dict())
    model = graft(base, num_depth_decoder_layers=2)
    grafted = model.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(grafted[name], tensor) and grafted[name].data_ptr() != tensor.data_ptr()
    added = set(grafted) - set(before)
    assert added and all("depth" in name for name in added)
    assert {name for name in added if grafted[name].dtype != dtype} == (
        {name for name in added if name.startswith("depth_head")} if dtype == torch.bfloat16 else set()
    )
    assert torch.equal(grafted["depth_modulation.linear.weight"], before["modulation.linear.weight"])
    for layer in ("linear_1", "linear_2"):
        twin = grafted[f"depth_time_embed.timestep_embedder.{layer}.weight"]
        assert torch.equal(twin, before[f"time_embed.{layer}.weight"])
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_graft_starts_at_zero_depth_and_undisturbed_mixing(base):
    """With depth tokens RGB changes, but only by attending to them: not by the mixers, nor by the depth level in RGB's
    modulation."""
    model, inputs = graft(base), make_inputs()
    sample, depth_sample = predict(model, inputs)
    assert not depth_sample.any()
    assert not torch.equal(sample, predict(base, make_inputs(depth=False))[0])
    temb = torch.randn(2, 16)
    mixed, _ = model.depth_time_embed(temb, inputs["timestep"], inputs["depth_timestep"])
    assert torch.equal(mixed, temb)
    # Where no token attends to depth, RGB is the base's although depth tokens go through all blocks.
    visible = torch.ones(17, 17, dtype=torch.bool)
    visible[:11, 11:] = False
    inputs["joint_attention_kwargs"] = {"attention_mask": visible}
    model.depth_decoder_blocks = torch.nn.ModuleList()
    assert torch.allclose(predict(model, inputs)[0], predict(base, make_inputs(depth=False))[0], atol=1e-6)


def test_a_graft_is_no_base(model):
    with pytest.raises(ValueError, match="has depth already"):
        graft(model)


def test_an_untrained_base_predicts_the_mean():
    """x0 = 0 at the start, whatever goes in, so the velocity is z / t."""
    base, inputs = ModalityForcingDiTTransformer2DModel(**TINY_DIT), make_inputs(depth=False)
    expected = inputs["hidden_states"] / inputs["timestep"].clamp(min=MIN_TIMESTEP)[:, None, None]
    assert torch.equal(predict(base, inputs)[0], expected)


def test_gradients_reach_every_weight(base):
    model = randomize(graft(base))
    output = model(**make_inputs())
    (output.sample.square().mean() + output.depth_sample.square().mean()).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


# Streams


def test_x_prediction(model):
    """The head predicts clean latents; the velocity returned is (z - x0) / max(t, 0.05), whatever the body's dtype."""
    clean = []
    model.proj_out.register_forward_hook(lambda _, __, output: clean.append(output))
    inputs = make_inputs() | {"timestep": torch.tensor([0.8, 0.01])}
    sample, _ = predict(model, inputs)
    expected = (inputs["hidden_states"] - clean[0]) / torch.tensor([0.8, 0.05])[:, None, None]
    assert torch.allclose(sample, expected, atol=1e-6)
    half = {n: x.bfloat16() if x.is_floating_point() and "timestep" not in n else x for n, x in inputs.items()}
    sample, depth_sample = predict(model.to(torch.bfloat16), half)
    assert clean[1].dtype == torch.bfloat16 and sample.dtype == depth_sample.dtype == torch.float32
    expected = (half["hidden_states"].float() - clean[1].float()) / torch.tensor([0.8, 0.05])[:, None, None]
    assert torch.allclose(sample, expected, atol=1e-6)


def test_modalities_hear_each_other_and_their_levels(model):
    inputs = make_inputs()
    sample, depth_sample = predict(model, inputs)
    for name in ("hidden_states", "timestep", "depth_hidden_states", "depth_timestep", "encoder_hidden_states"):
        other_sample, other_depth = predict(model, inputs | {name: inputs[name] * 0.5})
        changed = name == "encoder_hidden_states"  # normalised on the way in: its direction counts, not its length
        assert torch.allclose(other_sample, sample, atol=1e-5) == changed, name
        assert torch.allclose(other_depth, depth_sample, atol=1e-5) == changed, name
    text = inputs["encoder_hidden_states"].flip(-1)
    assert not close(predict(model, inputs | {"encoder_hidden_states": text}), (sample, depth_sample))


def test_text_positions_and_padding(model):
    """Text is a sequence, and zeros where it is padded are tokens that carry nothing in."""
    inputs = make_inputs()
    before = predict(model, inputs)
    assert not close(
        predict(model, inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}), before
    )
    padded = torch.cat([inputs["encoder_hidden_states"], torch.zeros(2, 3, 24)], dim=1)
    output = predict(model, inputs | {"encoder_hidden_states": padded, "txt_ids": position_ids(length=8)})
    assert all(torch.isfinite(x).all() for x in output)


def test_grouped_queries_are_repeated_keys(model):
    """Query heads 0..3 share the one key head: the same as four equal key heads."""
    wide = ModalityForcingDiTTransformer2DModel(**TINY_DEPTH_DIT | {"num_key_value_heads": 4})
    weights = model.state_dict()
    for name, tensor in weights.items():
        if name.endswith("to_qkv_mlp_proj.weight"):
            query, key, value, mlp = tensor.split(model.transformer_blocks[0].attn.projection_dims)
            weights[name] = torch.cat([query, key.repeat(4, 1), value.repeat(4, 1), mlp])
    wide.load_state_dict(weights)
    assert close(predict(model, make_inputs()), predict(wide, make_inputs()), atol=1e-5)


# diffusers' features


@pytest.mark.parametrize("config", [TINY_DIT, TINY_DEPTH_DIT])
def test_save_and_load(config, tmp_path):
    model, inputs = randomize(ModalityForcingDiTTransformer2DModel(**config)), make_inputs(config is TINY_DEPTH_DIT)
    model.save_pretrained(tmp_path)
    again = ModalityForcingDiTTransformer2DModel.from_pretrained(tmp_path)
    expected, output = predict(model, inputs), predict(again, inputs)
    assert torch.equal(output[0], expected[0])
    assert (output[1] is None) == (config is TINY_DIT) and (output[1] is None or torch.equal(output[1], expected[1]))


def loss_and_gradients(model):
    model.zero_grad()
    output = model(**make_inputs())
    loss = output.sample.square().mean() + output.depth_sample.square().mean()
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_regional_compile(model, checkpointing):
    loss, gradients = loss_and_gradients(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    again, again_gradients = loss_and_gradients(model)
    assert again == pytest.approx(loss, rel=1e-5)
    assert close(gradients, again_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_attention_backends(model, backend):
    before = predict(model, make_inputs())
    model.set_attention_backend(backend)
    assert close(before, predict(model, make_inputs()), atol=1e-5)


# The objective


def test_losses_against_the_formulas(model):
    """RGB and depth are x-predictions trained by the velocity loss; missing depth is noise at every level."""
    processor, generator = DepthProcessor(patch_size=4), seeded()
    latents = torch.randn(4, 6, 16, generator=generator)
    depth = torch.rand(4, 1, 8, 12, generator=generator) * 1.9
    valid = torch.rand(4, 1, 8, 12, generator=generator) > 0.3
    prompt_embeds = torch.randn(4, 5, 24, generator=generator)
    draw = draw_noise(ObjectiveConfig(), (6, 16), (1, 8, 12), [True] * 4, [seeded(i) for i in range(4)])
    draw.timestep, draw.depth_timestep = torch.tensor([0.3, 0.0, 0.9, 0.5]), torch.tensor([0.8, 0.6, 0.0, 0.02])
    clean, seen = [], {}
    model.proj_out.register_forward_hook(lambda _, __, output: clean.append(output))
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    losses = modality_forcing_loss(
        model, latents, depth, valid, prompt_embeds, draw, ObjectiveConfig(), depth_processor=processor
    )
    noisy = add_noise(latents, draw.noise, draw.timestep)
    noisy_depth = processor.unpatchify(seen["depth_hidden_states"], 8, 12)
    assert torch.equal(noisy_depth[~valid], draw.depth_noise[~valid])
    for i, t in enumerate(draw.timestep.tolist()):
        error = (noisy[i] - clean[0][i]) / max(t, 0.05) - (draw.noise[i] - latents[i])
        assert losses.rgb[i].item() == pytest.approx(error.square().mean().item() if t else 0.0, rel=1e-4)
    assert (losses.depth > 0).tolist() == [True, True, False, True]


def test_the_family_learns(base):
    """A few steps on one batch bring both losses down, from an untrained base on."""
    torch.manual_seed(0)
    model = graft(ModalityForcingDiTTransformer2DModel(**TINY_DIT)).train()
    assert_it_learns(model, text_channels=24, learning_rate=1e-2)


# Pipelines


@pytest.fixture
def pipe():
    return make_dit_pipeline()


@pytest.fixture
def base_pipe():
    return make_dit_pipeline(depth=False)


def call(pipe, *args, seed=0, num_inference_steps=2, output_type="np", **kwargs):
    return pipe(
        *args, generator=seeded(seed), num_inference_steps=num_inference_steps, output_type=output_type, **kwargs
    )


@pytest.mark.parametrize("kind", ["umt5", "t5"])
def test_text_features_of_a_t5_encoder(pipe, kind):
    if kind == "t5":
        config = T5Config(vocab_size=len(pipe.tokenizer), **TINY_T5)
        pipe.register_modules(text_encoder=T5EncoderModel(config).eval())
    prompt_embeds, text_ids = pipe.encode_prompt(["a cat", "a large red ball"])
    assert prompt_embeds.shape == (2, 24, 24) and text_ids.shape == (1, 24, 4)
    for prompt, features in zip(["a cat", "a large red ball"], prompt_embeds):
        tokens = pipe.tokenizer(prompt, return_tensors="pt")
        length = tokens.input_ids.shape[1]
        assert pipe.tokenizer.decode(tokens.input_ids[0]) == f"{prompt}</s>"
        with torch.no_grad():
            expected = pipe.text_encoder(**tokens).last_hidden_state[0]
        # Neither the padding nor the other prompt of the batch changes a feature.
        assert torch.allclose(features[:length], expected, atol=1e-5) and not features[length:].any()


def test_long_prompts_are_cut(pipe, monkeypatch):
    messages = []
    monkeypatch.setattr("mf_diffusers.modality_forcing.text_features.logger.warning", messages.append)
    a, b = (pipe.encode_prompt(prompt)[0] for prompt in ("word " * 10, "word " * 10 + "and more"))
    assert torch.equal(a, b) and "the text encoder takes 24" in messages[0]


def test_base_makes_images_from_text(base_pipe):
    output = call(base_pipe, ["a cat", "a dog"], height=24, width=40)
    assert output.images.shape == (2, 24, 40, 3) and output.images.min() >= 0 and output.images.max() <= 1
    assert output.depth is None and output.depth_mask is None
    assert not np.array_equal(output.images[0], output.images[1])
    unguided = call(base_pipe, ["a cat", "a dog"], height=24, width=40, guidance_scale=1.0)
    assert not np.array_equal(unguided.images, output.images)
    assert len(call(base_pipe, "a cat", num_images_per_prompt=2, output_type="pil").images) == 2
    one = call(base_pipe, "a cat", callback_on_step_end=lambda pipe, *_: setattr(pipe, "_interrupt", True))
    assert one.images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": IMAGE},
        {"prompt": "x", "depth": DEPTH},
        {"prompt": "x", "log2_alpha": 5.0},
        {"prompt": "x", "num_refinement_steps": 2},
        {"prompt": "x", "depth_latents": torch.zeros(1, 1, 32, 32)},
    ],
)
def test_base_has_no_depth(base_pipe, arguments):
    with pytest.raises(ValueError, match="this transformer is a text-to-image base"):
        call(base_pipe, **arguments)


def test_graft_onto_the_base(base_pipe):
    grafted = ModalityForcingPipeline.from_base(base_pipe, num_depth_decoder_layers=1)
    grafted.set_progress_bar_config(disable=True)
    assert grafted.depth_processor.config.patch_size == 4 and grafted.transformer.config.depth_channels == 16
    assert grafted.config.max_sequence_length == 24 and grafted.config.default_sample_size == 32
    assert grafted.scheduler.config.shift == pytest.approx(math.exp(1.1))
    assert ModalityForcingPipeline.from_base(base_pipe, max_sequence_length=8).config.max_sequence_length == 8
    output = call(grafted, "a cat")
    assert output.images.shape == (1, 32, 32, 3) and output.depth.shape == (1, 32, 32)
    with pytest.raises(ValueError, match="has depth already"):
        ModalityForcingPipeline.from_base(grafted)


def test_the_three_tasks(pipe):
    joint = call(pipe, "a cat", height=24, width=40)
    assert joint.images.shape == (1, 24, 40, 3) and joint.depth.shape == joint.depth_mask.shape == (1, 24, 40)
    assert np.isfinite(joint.depth).all() and (joint.depth > 0).all()
    refined = call(pipe, "a cat", height=24, width=40, num_refinement_steps=2, ensemble_size=2)
    assert np.array_equal(refined.images, joint.images) and refined.depth_uncertainty.shape == (1, 24, 40)
    estimated = call(pipe, image=np.stack([IMAGE, 1 - IMAGE]))
    assert estimated.images is None and estimated.depth.shape == (2, 40, 72)
    assert call(pipe, "a cat", depth=DEPTH).images.shape == (1, 40, 72, 3)


def test_depth_conditioning_runs_from_loose_to_rigid(pipe):
    rigid = call(pipe, "a cat", depth=DEPTH, num_inference_steps=4).images
    loose, middle, tight = (
        np.abs(call(pipe, "a cat", depth=DEPTH, num_inference_steps=4, log2_alpha=a).images - rigid).mean()
        for a in (5, 0, -14)
    )
    assert loose > middle > 4 * tight


def test_missing_depth_is_the_mask(pipe):
    holes = np.zeros(DEPTH.shape, bool)
    holes[10:20, 10:30] = True
    images = [call(pipe, "a cat", depth=np.where(holes, missing, DEPTH)).images for missing in (0, np.nan, np.inf)]
    images.append(call(pipe, "a cat", depth=DEPTH, depth_mask=~holes).images)
    assert all(np.array_equal(images[0], image) for image in images[1:])
    assert not np.array_equal(images[0], call(pipe, "a cat", depth=DEPTH).images)


def test_a_generator_for_each_result(pipe):
    generators = [seeded(1), seeded(2)]
    both = pipe(["a cat", "a dog"], generator=generators, num_inference_steps=2, output_type="np")
    for i, prompt in enumerate(["a cat", "a dog"]):
        one = call(pipe, prompt, seed=i + 1)
        assert np.allclose(one.images[0], both.images[i], atol=1e-4)
        assert close_depth(one.depth[0], both.depth[i], atol=1e-4)


def test_prompt_embeds(pipe):
    expected = call(pipe, "a cat")
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a cat")[0], pipe.encode_prompt("")[0]
    pipe.text_encoder = pipe.tokenizer = None
    output = call(pipe, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert np.array_equal(output.images, expected.images) and np.array_equal(output.depth, expected.depth)


def test_save_and_load_in_a_fresh_process(tmp_path):
    expected = {}
    for name, pipe in (("base", make_dit_pipeline(depth=False)), ("model", make_dit_pipeline())):
        pipe.save_pretrained(tmp_path / name)
        output = call(pipe, "a cat", output_type="latent")
        expected |= {f"{name}.images": output.images, f"{name}.depth": output.depth}
    script = f"""
import pathlib, torch, mf_diffusers
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
folder, tensors = pathlib.Path({str(tmp_path)!r}), {{}}
for name in ("base", "model"):
    pipe = DiffusionPipeline.from_pretrained(folder / name)
    assert type(pipe) is mf_diffusers.ModalityForcingPipeline and pipe.has_depth == (name == "model")
    output = pipe("a cat", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="latent")
    tensors |= {{f"{{name}}.images": output.images, f"{{name}}.depth": output.depth}}
save_file({{name: tensor for name, tensor in tensors.items() if tensor is not None}}, folder / "out.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"HF_HUB_OFFLINE": "1", "PATH": ""}, timeout=300)
    loaded = load_file(tmp_path / "out.safetensors")
    assert set(loaded) == {"base.images", "model.images", "model.depth"}
    assert all(torch.allclose(tensor, expected[name], atol=1e-4) for name, tensor in loaded.items())


def test_lora_weights_load_change_and_unload(pipe, tmp_path):
    transformer = randomize(ModalityForcingDiTTransformer2DModel(**TINY_DEPTH_DIT))
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_qkv_mlp_proj", "to_out"], init_lora_weights=False))
    lora = get_peft_model_state_dict(transformer)
    ModalityForcingPipeline.save_lora_weights(tmp_path, transformer_lora_layers=lora)
    before = call(pipe, "a cat")
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    changed = call(pipe, "a cat")
    assert not np.array_equal(before.images, changed.images) and not np.array_equal(before.depth, changed.depth)
    assert np.allclose(call(pipe, "a cat", attention_kwargs={"scale": 0.0}).images, before.images, atol=1e-5)
    pipe.set_adapters("style", 0.5)
    assert not np.array_equal(call(pipe, "a cat").images, changed.images)
    pipe.unload_lora_weights()
    after = call(pipe, "a cat")
    assert np.array_equal(before.images, after.images) and np.array_equal(before.depth, after.depth)


@pytest.mark.parametrize("depth", [False, True])
def test_half_precision_body(depth, tmp_path):
    make_dit_pipeline(depth).save_pretrained(tmp_path)
    half = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    output = call(half, "a cat")
    assert np.isfinite(output.images).all()
    if depth:
        assert half.transformer.depth_head.proj_out.weight.dtype == torch.float32
        assert len(np.unique(output.depth)) > 0.9 * output.depth.size * output.depth_mask.mean()


def test_components_that_do_not_fit(pipe):
    with pytest.raises(ValueError, match="patches are 8 pixels wide, the VAE's tokens 4"):
        call(ModalityForcingPipeline(**pipe.components | {"depth_processor": DepthProcessor(patch_size=8)}), "a cat")
    with pytest.raises(ValueError, match="static shift"):
        call(ModalityForcingPipeline(**pipe.components | {"depth_scheduler": None}), "a cat")
    with pytest.raises(ValueError, match=r"shape \(B, L, 24\), got \(1, 8, 40\)"):
        call(pipe, prompt_embeds=torch.zeros(1, 8, 40))


def test_a_base_on_the_command_line(base_pipe, tmp_path):
    base_pipe.save_pretrained(tmp_path / "base")
    checkpoint = read_checkpoint(tmp_path / "base", offline=True)
    assert "scheduler_shift" in checkpoint.facts and "depth_scheduler_shift" not in checkpoint.facts
    assert not any("depth" in name for name in checkpoint.parts["transformer"].weights)
    with pytest.raises(ValueError, match="a text-to-image base without depth: post-train it"):
        load_pipeline(str(tmp_path / "base"), "cpu", torch.float32)
