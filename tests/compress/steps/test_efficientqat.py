import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.blocks import found_in
from effjax.compress.rounding import fake
from effjax.compress.steps.efficientqat import EfficientQAT, end_to_end
from effjax.compress.steps.round import Round
from effjax.compress.storage.trees import stored_in
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from effjax.layers.stack import streams
from tests.compress.tiny import BATCH, TOKENS, language, pictures

TRAINING = {name: value for name, value in BATCH.items() if name != "mask"}
LAYOUT = Uniform(2, 8, False)
STEP = EfficientQAT(LAYOUT, batches=1, epochs=30, weight_lr=1e-2, grid_lr=1e-2, end_to_end=0)


def calibration(batch=TRAINING, told=None):
    return Calibration(lambda: [batch] * 8, jax.random.key(0), (told if told is not None else []).append)


@pytest.fixture(scope="module")
def subject():
    return language()


@pytest.fixture(scope="module")
def trained(subject):
    return STEP.apply(subject, calibration())


def logits(subject):
    return np.asarray(jax.jit(subject.model.apply)(subject.variables, TOKENS))


def loss(subject):
    return float(jax.jit(subject.task.metrics)(subject.variables, BATCH)["loss"].value())


def test_what_is_found_is_what_runs_through_the_stack(subject):
    ((blocks, entered),) = found_in(subject, [TRAINING, TRAINING])
    model = subject.model
    _, sown = jax.jit(lambda v: model.apply(v, TOKENS, BATCH["positions"], BATCH["segments"],
                                            mutable=["intermediates"]))(subject.variables)  # fmt: skip
    stream = streams(sown["intermediates"]["blocks"])
    np.testing.assert_array_equal(entered.x[1], stream[0])
    for layer in range(2):
        shared = jax.tree.map(lambda leaf: leaf[0], entered.shared)
        each = jax.tree.map(lambda leaf: leaf[0, layer], entered.each)  # noqa: B023
        y = jax.jit(blocks.run)(blocks.layer(subject.variables, layer), stream[layer], each, shared)
        np.testing.assert_allclose(y, stream[layer + 1], atol=1e-5)


def test_gradients_of_the_grid(draw):
    """Codes and zeros fixed: dL/ds = sum (c - z) dL/dw. A weight that is cut off has none, the others 1."""
    layout = Uniform(2, 8, False)
    matrix = jnp.asarray(draw.normal(size=(16, 3)), jnp.float32)
    scale, zero = layout.fit(matrix)
    scale = scale * 0.8  # so that some are cut off
    given = jnp.asarray(draw.normal(size=(16, 3)), jnp.float32)
    by_weight, by_scale = jax.grad(lambda w, s: jnp.sum(fake(layout, w, s, zero) * given), (0, 1))(
        matrix, scale
    )
    free = np.round(matrix.reshape(2, 8, 3) / scale[:, None]) + zero[:, None]
    inside = (free >= 0) & (free <= 3)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_allclose(by_weight, np.where(inside, 1, 0).reshape(16, 3) * given, atol=1e-6)
    codes = np.clip(free, 0, 3) - zero[:, None]
    through = codes - np.where(inside, matrix.reshape(2, 8, 3) / scale[:, None], 0.0)
    np.testing.assert_allclose(by_scale, np.sum(through * given.reshape(2, 8, 3), 1), atol=1e-4)


def test_it_begins_as_rounding_and_ends_better(subject, trained):
    """Round to nearest > grid alone > everything, as distance from what the network gave."""
    blocks = ("blocks/.*",)
    rounded = Round(LAYOUT, blocks).apply(subject, calibration())
    start = dataclasses.replace(STEP, epochs=0).apply(subject, calibration())
    for ours, theirs in zip(jax.tree.leaves(start.params), jax.tree.leaves(rounded.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    grid = dataclasses.replace(STEP, weight_lr=0.0).apply(subject, calibration())
    np.testing.assert_array_equal(
        grid.params["blocks"]["ffn_norm"]["scale"], subject.params["blocks"]["ffn_norm"]["scale"]
    )
    goal = logits(subject)
    errors = [np.mean((logits(one) - goal) ** 2) for one in (rounded, grid, trained)]
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0]
    assert {leaf.layout for leaf in stored_in(trained.params).values()} == {LAYOUT}
    assert sorted(stored_in(trained.params)) == sorted(stored_in(rounded.params))


def test_step_sizes_alone_lower_the_loss(trained):
    told = []
    tuned = end_to_end(trained, calibration(told=told), 8, 1e-2, 0.3)
    assert loss(tuned) < loss(trained)
    assert len(told) == 4
    for path, leaf in stored_in(tuned.params).items():
        before = stored_in(trained.params)[path]
        for ours, theirs in zip(leaf.codes + leaf.zero, before.codes + before.zero, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert leaf.scale.dtype == jnp.float16


@pytest.mark.parametrize("family", ["vision", "diffusion"])
def test_pictures_have_blocks_too(family):
    subject, batch = pictures(family)
    told = []
    step = dataclasses.replace(
        STEP, layout=Uniform(2, 4, True), epochs=20, weight_lr=3e-3, kernels=("blocks/.*",)
    )
    small = step.apply(subject, calibration(batch, told))
    assert len(told) == subject.model.depth
    for line in told:
        began, ended = line.split("error ")[1].removesuffix(" at last.").split(" at first, ")
        assert float(ended) < 0.9 * float(began)
    assert np.isfinite(
        float(jax.jit(small.task.metrics)(small.variables, {**batch, "mask": jnp.ones(2)})["loss"].value())
    )


BITS = {(2, 64): 2.28, (2, 128): 2.14, (3, 128): 3.15, (4, 128): 4.16}


@pytest.mark.parametrize(("layout", "bits"), BITS.items())
def test_bits_a_weight_are_the_published_ones(layout, bits):
    assert abs(Uniform(*layout, False).bits_a_weight(4096, 4096) - bits) < 0.005


def test_what_cannot_be_trained_is_refused(subject):
    with pytest.raises(UsageError, match="names none inside the blocks"):
        dataclasses.replace(STEP, kernels=("embedding",)).apply(subject, calibration())
    with pytest.raises(UsageError, match="group=5"):
        dataclasses.replace(STEP, layout=Uniform(2, 5, False)).apply(subject, calibration())
    broken = subject.with_params({**subject.params, "embedding": subject.params["embedding"] * jnp.nan})
    with pytest.raises(UsageError, match="not finite"):
        STEP.apply(broken, calibration())
    with pytest.raises(UsageError, match="batches"):
        dataclasses.replace(STEP, batches=0)
    shared = subject.with_model(subject.model.clone(shared=(".*",)), subject.variables)
    shared = shared.with_params(shared.task.init(jax.random.key(0), BATCH)["params"])
    with pytest.raises(UsageError, match="shared parameters"):
        STEP.apply(shared, calibration())
