"""Training with parts of a video given: what the model sees, and what counts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.diffusion.vdt import VARIANTS, get_config
from effjax.diffusion import masks
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import mean_of_each
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.mean import add, values

SHAPE = (4, 3, 3, 1)


class Linear(nn.Module):
    """The smallest denoiser of videos, with a say for every value."""

    null_class: bool = False
    learned_sigma: bool = False
    classes: int = 1

    def null(self, label):
        return label

    @nn.compact
    def __call__(self, x_t, t, label, train=False):
        flat = x_t.reshape(x_t.shape[0], -1)
        out = nn.Dense(flat.shape[1] * (1 + self.learned_sigma))(flat) + 1e-3 * t[:, None]
        return (out + label[:, None]).reshape(*x_t.shape[:-1], -1)


def batch(count=6, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "video": jnp.asarray(draw.uniform(-1, 1, size=(count, *SHAPE)), jnp.float32),
        "mask": jnp.ones(count),
    }


def task(*kinds, learned=False, **changes):
    process = DDPM() if learned else RectifiedFlow()
    fields = dict(model=Linear(learned_sigma=learned), process=process, label_dropout=0.0)
    return Diffusion(**{**fields, "content": "video", "condition": None, "masks": kinds, **changes})


MIXED = (masks.Unconditional(), masks.Forward(given=2), masks.RandomFrames(0.5), masks.Completion(ends=1))


@functools.cache
def ready(built):
    """Variables of the model, and a batch that is prepared for the task."""
    keys = jax.random.key(0), jax.random.key(1)
    return jax.jit(lambda: (built.init(keys[0], batch()), built.prepare(batch(), keys[1])))()


@functools.cache
def loss_of(built):
    """`(variables, prepared) -> means`, compiled once a task."""
    return jax.jit(lambda variables, prepared: built.loss(variables, prepared, jax.random.key(2))[0])


def _total(means, prepared, params):
    return means({"params": params}, prepared)["loss"].total


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resolves(variant):
    experiment = resolve(get_config(variant))
    kinds = [type(mask) for mask in experiment.task.masks]
    if "-" not in variant:
        assert kinds == list(masks.KINDS.values())
    else:
        assert kinds == ([masks.Forward] if variant.endswith("cityscapes") else [])
    assert experiment.model.learned_sigma == experiment.task.process.learned_sigma
    if experiment.data.expected:
        batch = experiment.data.described().example_batch(1)
        assert batch["video"].shape[1] == experiment.model.frames


def test_masks_are_drawn_for_each_example_and_change_no_other_draw():
    _, prepared = ready(task(*MIXED))
    assert prepared["known"].shape == (6, *SHAPE[:3], 1)
    assert prepared["known"].dtype == bool
    assert len({given.tobytes() for given in np.asarray(prepared["known"])}) > 2
    _, plain = ready(task())
    assert set(prepared) == {*plain, "known"} == {"video", "time", "noise", "known"}
    for name in plain:
        np.testing.assert_array_equal(prepared[name], plain[name])


@pytest.mark.parametrize("learned", [False, True])
def test_loss_is_that_of_the_noised_part_by_a_loop(learned):
    built = task(*MIXED, learned=learned)
    variables, prepared = ready(built)
    means = loss_of(built)(variables, prepared)
    content, noise, t, known = (prepared[n] for n in ("video", "noise", "time", "known"))

    @jax.jit
    def both(variables):
        x_t = jnp.where(known, content, built.process.noise(content, noise, t))
        out = built.model.apply(variables, x_t, built.process.network_time(t), jnp.zeros(6, int))
        return out, built.process.target(content, noise, t)

    out, target = (np.asarray(a) for a in both(variables))
    hidden = ~np.asarray(known)[..., 0]
    errors = [
        (float(out[b, f, i, j, 0]) - float(target[b, f, i, j, 0])) ** 2
        for b, f, i, j in np.ndindex(6, *SHAPE[:3])
        if hidden[b, f, i, j]
    ]
    assert 20 < len(errors) < 6 * 36
    assert float(means["mse"].value()) == pytest.approx(np.mean(errors), rel=1e-5)
    assert ("vlb" in means) == learned


def test_all_given_costs_nothing_and_teaches_nothing():
    """Verify (c): M = 1."""
    for learned in (False, True):
        built = task(*MIXED, learned=learned)
        variables, prepared = ready(built)
        prepared = {**prepared, "known": jnp.ones_like(prepared["known"])}

        loss = functools.partial(_total, loss_of(built), prepared)
        value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
        assert float(value) == 0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_nothing_given_is_the_task_without_masks():
    """Verify (c): M = 0."""
    variables, prepared = ready(task(masks.Unconditional()))
    assert not np.any(prepared["known"])
    masked = loss_of(task(masks.Unconditional()))(variables, prepared)
    plain = loss_of(task())(variables, {n: value for n, value in prepared.items() if n != "known"})
    assert float(masked["loss"].value()) == pytest.approx(float(plain["loss"].value()), rel=1e-6)


def test_given_places_have_no_gradient_and_are_seen_clean():
    built = task(masks.Forward(given=2))
    variables, prepared = ready(built)

    def loss(noise):
        return loss_of(built)(variables, {**prepared, "noise": noise})["loss"].total

    slope = np.asarray(jax.jit(jax.grad(loss))(prepared["noise"]))
    assert not np.any(slope[:, :2])  # neither seen nor asked for
    assert np.all(np.any(slope[:, 2:].reshape(6, -1) != 0, axis=1))
    other = {**prepared, "video": prepared["video"].at[:, 0].add(0.1)}
    assert float(loss_of(built)(variables, other)["loss"].total) != float(loss(prepared["noise"]))


def test_pieces_add_up_to_the_large_batch():
    built = task(*MIXED)
    variables, prepared = ready(built)
    whole = values(loss_of(built)(variables, prepared))

    def piece(start):
        part = {name: value[start : start + 3] for name, value in prepared.items()}
        return loss_of(built)(variables, part)

    pooled = values(add(piece(0), piece(3)))
    assert float(pooled["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)


def test_metrics_are_fixed_and_ignore_masked_rows():
    built = task(*MIXED)
    variables, _ = ready(built)
    full = batch(8)
    full["mask"] = jnp.array([1.0] * 6 + [0.0] * 2)
    garbage = {**full, "video": full["video"].at[6:].set(jnp.nan)}
    metrics = jax.jit(built.metrics)
    first, second = metrics(variables, full), metrics(variables, garbage)
    np.testing.assert_array_equal(first["loss"].total, second["loss"].total)
    assert 0 < float(first["loss"].count) < 6  # in videos' worth of noised values


def test_a_mean_over_what_counts():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    where = jnp.array([[True, False, True], [False] * 3])[..., None]
    np.testing.assert_allclose(mean_of_each(x, where), [(0 + 1 + 4 + 5) / 4, 0.0])
    np.testing.assert_allclose(mean_of_each(x), [2.5, 8.5])


def test_what_does_not_fit_together():
    with pytest.raises(UsageError, match="no condition to drop"):
        task(model=Linear(null_class=True), label_dropout=0.1)
    with pytest.raises(UsageError, match="weight=-1 must be above 0"):
        task(masks.Forward(weight=-1.0))
