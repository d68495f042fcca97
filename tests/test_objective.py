import math

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from tiny import TINY_TRANSFORMER, randomize

from mf_diffusers import DepthProcessor, ModalityForcingFlux2Transformer2DModel
from mf_diffusers.modality_forcing.noise import add_noise
from mf_diffusers.modality_forcing.objective import NoiseDraw, ObjectiveConfig, draw_noise, modality_forcing_loss


PROCESSOR = DepthProcessor(patch_size=4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_batch(batch_size=4, seed=0):
    generator = seeded(seed)
    return {
        "latents": torch.randn(batch_size, 6, 16, generator=generator),
        "depth": torch.rand(batch_size, 1, 8, 12, generator=generator) * 1.9,
        "valid": torch.rand(batch_size, 1, 8, 12, generator=generator) > 0.3,
        "prompt_embeds": torch.randn(batch_size, 5, 48, generator=generator),
    }


def make_draw(batch_size=4, **levels):
    draw = draw_noise(
        ObjectiveConfig(), (6, 16), (1, 8, 12), [True] * batch_size, [seeded(i) for i in range(batch_size)]
    )
    for name, level in levels.items():
        setattr(draw, name, torch.full((batch_size,), level))
    return draw


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(ModalityForcingFlux2Transformer2DModel(**TINY_TRANSFORMER))


def loss(model, batch, draw, config=None, teacher=None):
    return modality_forcing_loss(
        model, **batch, draw=draw, config=config or ObjectiveConfig(), depth_processor=PROCESSOR, teacher=teacher
    )


def test_task_shares_and_levels():
    config = ObjectiveConfig(caption_dropout=0.15)
    draw = draw_noise(config, (1, 1), (1, 1, 1), [True] * 100_000, [seeded()] * 100_000)
    image_to_depth, depth_to_image = draw.timestep == 0, draw.depth_timestep == 0
    assert image_to_depth.float().mean() == pytest.approx(0.2, abs=0.01)
    assert depth_to_image.float().mean() == pytest.approx(0.2, abs=0.01)
    assert not (image_to_depth & depth_to_image).any()
    assert draw.drop_caption.float().mean() == pytest.approx(0.15, abs=0.01)
    joint = ~image_to_depth & ~depth_to_image
    levels = torch.stack([draw.timestep[joint], draw.depth_timestep[joint]])
    assert torch.corrcoef(levels)[0, 1].abs() < 0.02


def test_samples_without_depth_train_rgb_alone(model):
    draw = draw_noise(ObjectiveConfig(), (6, 16), (1, 8, 12), [False] * 200, [seeded(i) for i in range(200)])
    assert (draw.timestep > 0).all() and (draw.depth_timestep > 0).all()
    batch = make_batch() | {"valid": torch.zeros(4, 1, 8, 12, dtype=torch.bool)}
    losses = loss(model, batch, make_draw(timestep=0.5, depth_timestep=0.5))
    assert (losses.rgb > 0).all() and not losses.depth.any() and torch.isfinite(losses.total)


def test_a_draw_does_not_depend_on_the_batch():
    one = draw_noise(ObjectiveConfig(), (6, 16), (1, 8, 12), [True], [seeded(2)])
    many = draw_noise(ObjectiveConfig(), (6, 16), (1, 8, 12), [True] * 4, [seeded(i) for i in range(4)])
    assert torch.equal(one.noise[0], many.noise[2]) and one.timestep[0] == many.timestep[2]


def test_a_perfect_model_pays_nothing():
    batch = make_batch()
    for levels in ({"timestep": 0.6, "depth_timestep": 0.4}, {"timestep": 0.6, "depth_timestep": 0.01}):
        draw = make_draw(**levels)

        def oracle(**inputs):
            return draw.noise - batch["latents"], PROCESSOR.patchify(batch["depth"])  # noqa: B023

        losses = loss(oracle, batch, draw)
        assert losses.total < 1e-8


def test_losses_against_the_formulas(model):
    batch, draw = make_batch(), make_draw()
    draw.timestep, draw.depth_timestep = torch.tensor([0.3, 0.0, 0.9, 0.5]), torch.tensor([0.8, 0.6, 0.0, 0.02])
    seen = {}

    def spy(**inputs):
        seen.update(inputs)
        return model(**inputs)

    losses = loss(spy, batch, draw, ObjectiveConfig(depth_weight=0.5))
    velocity, clean = model(**seen)
    clean = PROCESSOR.unpatchify(clean, 8, 12)
    noisy_depth = PROCESSOR.unpatchify(seen["depth_hidden_states"], 8, 12)
    for i in range(4):
        valid = batch["valid"][i]
        # Missing pixels are noise at every level.
        assert torch.equal(noisy_depth[i][~valid], draw.depth_noise[i][~valid])
        t, t_depth = draw.timestep[i].item(), draw.depth_timestep[i].item()
        rgb = (velocity[i] - (draw.noise[i] - batch["latents"][i])).square().mean() if t > 0 else 0.0
        error = (clean[i] - batch["depth"][i])[valid] / max(t_depth, 0.05)
        depth = error.square().mean() if t_depth > 0 else 0.0
        assert losses.rgb[i].item() == pytest.approx(float(rgb), rel=1e-4)
        assert losses.depth[i].item() == pytest.approx(float(depth), rel=1e-3)
    assert losses.total.item() == pytest.approx((losses.rgb + 0.5 * losses.depth).mean().item(), rel=1e-5)
    assert torch.allclose(seen["hidden_states"], add_noise(batch["latents"], draw.noise, draw.timestep))


def test_missing_pixels_do_not_count(model):
    batch, draw = make_batch(), make_draw(timestep=0.5, depth_timestep=0.5)
    other = batch | {"depth": torch.where(batch["valid"], batch["depth"], torch.tensor(123.0))}
    assert torch.equal(loss(model, batch, draw).total, loss(model, other, draw).total)


def test_self_distillation():
    torch.manual_seed(0)
    config = {k: v for k, v in TINY_TRANSFORMER.items() if "depth" not in k}
    base = Flux2Transformer2DModel(**config, guidance_embeds=False)
    model = randomize(ModalityForcingFlux2Transformer2DModel.from_base(base, depth_channels=16))
    objective = ObjectiveConfig(distillation_high=1.0, distillation_low=0.25)
    batch = make_batch()
    noisy_depth = loss(model, batch, make_draw(timestep=0.5, depth_timestep=1.0), objective, base)
    draw = make_draw(timestep=0.5, depth_timestep=0.4)
    mixed = loss(model, batch, draw, objective, base)
    assert (noisy_depth.distillation > 0).all()

    def like_base(**inputs):
        return base(**{k: v for k, v in inputs.items() if "depth" not in k})[0], torch.zeros(4, 6, 16)

    assert not loss(like_base, batch, draw, objective, base).distillation.any()

    def off_by_one(**inputs):
        velocity, depth = like_base(**inputs)
        return velocity + 1, depth

    weights = loss(off_by_one, batch, draw, objective, base).distillation
    assert torch.allclose(weights, torch.full((4,), 1.0 * 0.4 + 0.25 * 0.6), atol=1e-5)
    assert math.isclose(mixed.total.item(), (mixed.rgb + mixed.depth + mixed.distillation).mean().item(), rel_tol=1e-5)
    clean_image = make_draw(timestep=0.0, depth_timestep=0.5)
    assert not loss(model, batch, clean_image, objective, base).distillation.any()
    mixed.total.backward()
    assert all(parameter.grad is None for parameter in base.parameters())


def test_batches_split_over_processes_add_up(model):
    batch, draw = make_batch(), make_draw()
    whole = loss(model, batch, draw).total
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        part_draw = NoiseDraw(*(getattr(draw, name)[part] for name in draw.__dataclass_fields__))
        halves.append(loss(model, {k: v[part] for k, v in batch.items()}, part_draw).total)
    assert whole.item() == pytest.approx(sum(h.item() for h in halves) / 2, rel=1e-5)
