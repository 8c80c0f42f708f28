import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion.dit import SIZES, get_config
from effjax import models
from effjax.config import build_kind
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.latents import Latents
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.errors import UsageError
from effjax.models.autoencoder import Autoencoder
from effjax.train import tasks
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.mean import add, values

CLASSES = 3


class Linear(nn.Module):
    """The smallest denoiser that listens to everything."""

    classes: int = CLASSES
    null_class: bool = True
    learned_sigma: bool = False

    def null(self, label):
        return jnp.full_like(label, self.classes)

    @nn.compact
    def __call__(self, x_t, t, label, train=False):
        steer = nn.Embed(self.classes + self.null_class, 1)(label) + 1e-3 * t[:, None]  # [B, 1]
        out = nn.Dense(x_t.shape[-1] * (1 + self.learned_sigma))(x_t) + steer[:, None, None, :]
        return out.astype(x_t.dtype)


def batch(count=6, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(draw.uniform(-1, 1, size=(count, 4, 4, 1)), jnp.float32),
        "label": jnp.asarray(np.arange(count) % CLASSES),
        "mask": jnp.ones(count),
    }


def task(**changes):
    fields = {"model": Linear(), "process": DDPM(sigma="large")}
    return Diffusion(**{**fields, **changes})


@pytest.mark.parametrize("variant", [size + end for size in SIZES for end in ("", "-flow")])
def test_every_variant_builds_its_task(variant):
    config = get_config(variant)
    model = build_kind(models.KINDS, config.model, "config.model")
    built = build_kind(tasks.KINDS, config.task, "config.task", given={"model": model})
    assert isinstance(built.process, RectifiedFlow if variant.endswith("-flow") else DDPM)
    assert int(built.null(jnp.zeros(1, jnp.int32))[0]) == model.classes


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["smoke", "smoke-flow"])
def test_a_step_of_the_real_model_is_finite_and_reaches_the_loss_of_its_zero_output(variant):
    config = get_config(variant)
    model = build_kind(models.KINDS, config.model, "config.model")
    built = build_kind(tasks.KINDS, config.task, "config.task", given={"model": model})
    key = jax.random.key(0)
    variables = meta.unbox(jax.jit(built.init)(key, batch()))

    @jax.jit
    def step(variables, batch):
        prepared = built.prepare(batch, key)

        def loss(params):
            means, _ = built.loss({"params": params}, prepared, key)
            return means["loss"].value(), means

        (_, means), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return prepared, means, grads

    prepared, means, grads = step(variables, batch())
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert np.any(grads["output"]["kernel"])
    target = built.process.target(prepared["image"], prepared["noise"], prepared["time"])
    assert float(means["mse"].value()) == pytest.approx(float(jnp.mean(target**2)), rel=1e-5)
    assert ("vlb" in means) == (variant == "smoke")


def test_prepare_draws_for_each_example():
    many = batch(3000)
    prepared = task(label_dropout=0.3).prepare(many, jax.random.key(1))
    assert float(jnp.mean(prepared["label"] == CLASSES)) == pytest.approx(0.3, abs=0.03)
    kept = prepared["label"] != CLASSES
    np.testing.assert_array_equal(prepared["label"][kept], many["label"][kept])
    assert float(jnp.mean(prepared["time"])) == pytest.approx(499.5, rel=0.05)
    noise = np.asarray(prepared["noise"]).reshape(3000, -1)
    assert noise.std() == pytest.approx(1.0, rel=0.02)
    assert abs(np.corrcoef(noise[:1500, 0], noise[1500:, 0])[0, 1]) < 0.1
    np.testing.assert_array_equal(prepared["image"], many["image"])
    assert np.all(task(label_dropout=0.0).prepare(many, jax.random.key(1))["label"] == many["label"])


def test_loss_is_a_function_of_the_prepared_batch_and_adds_up_over_pieces():
    built = task()
    variables = built.init(jax.random.key(0), batch())
    prepared = built.prepare(batch(), jax.random.key(1))
    whole, _ = built.loss(variables, prepared, jax.random.key(2))
    other, _ = built.loss(variables, prepared, jax.random.key(3))
    np.testing.assert_array_equal(whole["loss"].total, other["loss"].total)

    def piece(start):
        part = {name: value[start : start + 3] for name, value in prepared.items()}
        return built.loss(variables, part, jax.random.key(2))[0]

    pooled = values(add(piece(0), piece(3)))
    assert float(pooled["loss"]) == pytest.approx(float(whole["loss"].value()), rel=1e-6)


def test_metrics_are_fixed_and_ignore_masked_rows():
    built = task()
    variables = built.init(jax.random.key(0), batch())
    full = batch(8)
    full["mask"] = jnp.array([1.0] * 6 + [0.0] * 2)
    garbage = dict(full, image=full["image"].at[6:].set(jnp.nan))
    first, second = built.metrics(variables, full), built.metrics(variables, garbage)
    assert float(first["loss"].count) == 6
    np.testing.assert_array_equal(first["loss"].total, second["loss"].total)
    np.testing.assert_array_equal(first["loss"].total, built.metrics(variables, full)["loss"].total)


def test_metrics_cover_all_times_evenly():
    seen = []

    class Spy(Linear):
        @nn.compact
        def __call__(self, x_t, t, label, train=False):
            seen.append(t)
            return super().__call__(x_t, t, label, train)

    built = task(model=Spy())
    built.metrics(built.init(jax.random.key(0), batch()), batch(50))
    gaps = np.diff(np.sort(np.concatenate([[0], np.asarray(seen[-1]), [1000]])))
    assert len(gaps) == 51
    assert gaps.max() < 2.7 * 1000 / 50  # three lengths of gaps, none long: no cluster and no hole


def test_network_computes_in_the_dtype_of_its_parameters_and_the_process_in_float32():
    seen = []

    class Spy(Linear):
        @nn.compact
        def __call__(self, x_t, t, label, train=False):
            seen.append((x_t.dtype, t.dtype))
            return super().__call__(x_t, t, label, train)

    built = task(model=Spy())
    variables = built.init(jax.random.key(0), batch())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    means, _ = built.loss(half, built.prepare(batch(), jax.random.key(1)), jax.random.key(2))
    assert seen[-1] == (jnp.bfloat16, jnp.float32)
    assert means["loss"].total.dtype == jnp.float32
    x, label = batch()["image"], batch()["label"]
    assert built.denoiser(half).predict(x, jnp.zeros(6, jnp.int32), label, None)[0].dtype == jnp.float32


def test_what_does_not_fit_together():
    with pytest.raises(UsageError, match="needs a null class"):
        task(model=Linear(null_class=False))
    with pytest.raises(UsageError, match="learned_sigma=False and its process True"):
        task(process=DDPM())
    with pytest.raises(UsageError, match="below 1"):
        task(label_dropout=1.0)
    task(model=Linear(null_class=False), label_dropout=0.0)


class Talkative(nn.Module):
    """Noises videos, listens to text, and has losses of its own."""

    null_class: bool = True
    learned_sigma: bool = False

    def null(self, text):
        return jnp.zeros_like(text)

    @nn.compact
    def __call__(self, x_t, t, text, train=False):
        steer = nn.Dense(1)(text).mean(1) + 1e-3 * t[:, None]  # [B, 1]
        self.sow("losses", "balance", jnp.asarray(0.25))
        self.sow("losses", "balance", jnp.asarray(0.5))
        self.sow("losses", "prior", jnp.asarray([0.125, 0.125]))
        return nn.Dense(x_t.shape[-1])(x_t) + steer[:, None, None, None]


def test_content_and_condition_are_fields_of_the_batch_and_the_models_losses_count():
    task = Diffusion(Talkative(), RectifiedFlow(), 0.5, content="video", condition="text")
    given = {"video": jnp.ones((64, 2, 4, 4, 1)), "text": jnp.ones((64, 3, 5)), "mask": jnp.ones(64)}
    variables = task.init(jax.random.key(0), given)
    assert set(variables) == {"params"}
    ready = task.prepare(given, jax.random.key(1))
    silent = np.asarray((ready["text"] == 0).all((1, 2)))
    assert 10 < silent.sum() < 54  # each is dropped whole or not at all
    assert np.asarray(ready["text"])[~silent].min() == 1
    means, collections = task.loss(variables, ready, jax.random.key(2))
    assert not collections
    assert means["balance"].value() == 0.75
    assert means["prior"].value() == 0.25
    np.testing.assert_allclose(means["loss"].value(), means["mse"].value() + 1, rtol=1e-6)
    plain = task.metrics(variables, given)
    assert set(plain) == {"loss", "mse"}


class Bright(nn.Module):
    """Predicts the noisy picture itself, times a weight."""

    null_class: bool = False
    learned_sigma: bool = False

    @nn.compact
    def __call__(self, x_t, t, label, train=False):
        return self.param("weight", nn.initializers.ones, ()) * x_t


def test_noise_may_come_with_the_examples():
    task = Diffusion(Bright(), RectifiedFlow(), 0.0, coupling="start")
    given = batch() | {"start": jnp.full((6, 4, 4, 1), 0.5)}
    variables = meta.unbox(task.init(jax.random.key(0), given))
    ready = task.prepare(given, jax.random.key(1))
    np.testing.assert_array_equal(ready["noise"], given["start"])
    means, _ = task.loss(variables, ready, jax.random.key(2))
    t = np.asarray(ready["time"])[:, None, None, None]
    image = np.asarray(given["image"])
    expected = np.mean(((1 - t) * image + t * 0.5 - (0.5 - image)) ** 2)
    np.testing.assert_allclose(means["loss"].value(), expected, rtol=1e-5)


def coded(**changes):
    model = Autoencoder(widths=(4, 4), latent=3, channels=1, blocks=1, groups=2, scale=2.0)
    return Latents(**{"model": model, "weights": "runs/vae", **changes})


def test_an_autoencoder_makes_what_is_noised_and_stays_as_it_is():
    task = Diffusion(Bright(), RectifiedFlow(), 0.0, latents=coded())
    assert task.frozen == {"autoencoder": "runs/vae"}
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), batch()))
    ready = task.prepare(batch(), jax.random.key(1))
    assert ready["noise"].shape == (6, 2, 2, 3) == (6, *task.shape((4, 4, 1)))
    means, collections = jax.jit(task.loss)(variables, ready, jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, collections["autoencoder"], variables["autoencoder"])
    latents = jax.jit(functools.partial(task.latents.model.apply, method="latents"))(
        variables["autoencoder"], ready["image"], ready["code"]
    )
    t = np.asarray(ready["time"])[:, None, None, None]
    noise = np.asarray(ready["noise"])
    expected = np.mean(((1 - t) * latents + t * noise - (noise - latents)) ** 2)
    np.testing.assert_allclose(means["loss"].value(), expected, rtol=1e-4)
    drawn = jax.jit(task.pictures)(variables, latents)
    assert drawn.shape == (6, 4, 4, 1)
    np.testing.assert_array_equal(task.shown(variables, batch()["image"]), batch()["image"])
    gradient = jax.jit(jax.grad(lambda v: task.loss(v, ready, jax.random.key(2))[0]["loss"].total))(variables)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["autoencoder"]))


def test_data_may_hold_latents_already():
    task = Diffusion(Bright(), RectifiedFlow(), 0.0, latents=coded(encoded=True))
    given = batch() | {"image": jnp.ones((6, 2, 2, 3))}
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), given))
    assert task.prepare(given, jax.random.key(1))["noise"].shape == (6, 2, 2, 3)
    assert jax.jit(task.shown)(variables, given["image"]).shape == (6, 4, 4, 1)
    video = jnp.ones((2, 5, 2, 2, 3))
    frames = jax.jit(task.pictures)(variables, video)
    assert frames.shape == (2, 5, 4, 4, 1)
    np.testing.assert_allclose(frames[1, 3], task.pictures(variables, video[1])[3], atol=1e-5)


def test_data_of_another_size_than_the_noise_are_refused():
    pixels = Diffusion(Bright(), RectifiedFlow(), 0.0)
    pixels.check({"params": {}}, batch())
    with pytest.raises(UsageError, match=r"'image', has a root mean square of 100, .*pictures in \[-1, 1\]"):
        pixels.check({"params": {}}, batch() | {"image": jnp.full((6, 4, 4, 1), 100.0)})
    latent = Diffusion(Bright(), RectifiedFlow(), 0.0, latents=coded(encoded=True))
    with pytest.raises(UsageError, match=r"root mean square of 0.1, .*or latents times 10"):
        latent.check({"params": {}, "autoencoder": {}}, batch() | {"image": jnp.full((6, 2, 2, 3), 0.1)})
    with pytest.raises(UsageError, match="latents of 4 channels, and the autoencoder's have 3"):
        latent.shape((2, 2, 4))
    coding = Diffusion(Bright(), RectifiedFlow(), 0.0, latents=coded())
    variables = meta.unbox(jax.jit(coding.init)(jax.random.key(0), batch()))
    size = float(jnp.sqrt(jnp.mean(coding.latents.encode(variables["autoencoder"], batch()["image"]) ** 2)))
    grown = dataclasses.replace(coding.latents.model, scale=2.0 * 50 / size)
    wrong = dataclasses.replace(coding, latents=coded(model=grown))
    with pytest.raises(UsageError, match=r"root mean square of 50, .*scale to about"):
        wrong.check(variables, batch())
