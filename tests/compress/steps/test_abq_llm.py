import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.blocks import found_in, within
from effjax.compress.equivalent import pairs_of, scaled
from effjax.compress.steps.abq_llm import ABQ, corrected, divergence
from effjax.compress.steps.round import Round
from effjax.compress.storage.bit_planes import BitPlanes
from effjax.compress.storage.trees import replaced, stored_in
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from effjax.matching import path_of
from tests.compress.tiny import BATCH, TOKENS, language

TRAINING = {name: value for name, value in BATCH.items() if name != "mask"}
STEP = ABQ(batches=1, epochs=25, ends=(1, 0))


def calibration(told=None):
    return Calibration(lambda: [TRAINING] * 4, jax.random.key(0), (told if told is not None else []).append)


@pytest.fixture(scope="module")
def subject():
    return language()


def logits(subject):
    return np.asarray(jax.jit(subject.model.apply)(subject.variables, TOKENS))


def test_scaled_channels_change_nothing_and_wrong_pairs_are_left_out(subject):
    """GQA with a gated FFN has all four; a pair through a SiLU would change the block."""
    ((blocks, entered),) = found_in(subject, [TRAINING])
    places = within(blocks, subject.places())
    variables = blocks.layer(subject.variables, 1)
    given = jax.tree.map(lambda leaf: leaf[0], (entered.x, entered.shared))
    run = jax.jit(lambda params: blocks.run({"params": params}, given[0], None, given[1]))
    flat, _ = jax.tree_util.tree_flatten_with_path(variables["params"])
    leaves = {path_of(key_path): leaf for key_path, leaf in flat}
    each = entered.each
    if each is not None:
        one = jax.tree.map(lambda leaf: leaf[0, 1], each)
        run = jax.jit(lambda params: blocks.run({"params": params}, given[0], one, given[1]))
    found = pairs_of(variables["params"], leaves, places, run, jax.random.key(0))
    assert [pair.maker for pair in found] == ["mixer_norm", "ffn_norm", "mixer/value", "ffn/expand"]
    assert len(found[1].readers) == 2
    wrong = dataclasses.replace(found[3], maker="ffn/gate")
    made = scaled(leaves, places, {wrong: jnp.full((32,), 2.0)})
    far = jnp.max(jnp.abs(run(replaced(variables["params"], made)) - run(variables["params"])))
    assert float(far) > 1e-2


def test_learned_ranges_beat_rounding(subject):
    told = []
    layout = STEP.layout
    rounded = Round(layout, ("blocks/.*",)).apply(subject, calibration())
    small = STEP.apply(subject, calibration(told))
    assert len(told) == 2
    for line in told:
        began, ended = line.split("loss ")[1].removesuffix(" at last.").split(" at first, ")
        assert float(ended) < float(began)
    assert sorted(stored_in(small.params)) == sorted(stored_in(rounded.params))
    assert {leaf.layout for leaf in stored_in(small.params).values()} == {layout}
    goal = logits(subject)
    ours, theirs = (np.mean((logits(one) - goal) ** 2) for one in (small, rounded))
    assert ours < 0.8 * theirs


def test_the_loss_is_nothing_where_all_is_alike(draw):
    a, b = (jnp.asarray(draw.normal(size=(2, 5, 8)), jnp.float32) for _ in range(2))
    assert abs(float(corrected(a, a, a))) < 1e-5
    # What only differs in size has cosines of 1: what is left are the squared errors.
    np.testing.assert_allclose(corrected(2 * a, a, a), 2 * jnp.mean(a**2), rtol=1e-4)

    def plain(y):
        y, loss = np.asarray(y, np.float64), 0.0
        for other in (np.asarray(a, np.float64), np.asarray(b, np.float64)):
            cosines = np.sum(y * other, -1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(other, axis=-1)
            loss += -np.log(np.abs(cosines.mean())) + np.mean((y - other) ** 2)
        return loss

    y = a + 0.5 * b
    np.testing.assert_allclose(corrected(y, a, b), plain(y), rtol=1e-4)
    slope = jnp.vdot(jax.grad(lambda y: corrected(y, a, b))(y), b)
    step = 1e-5 * np.asarray(b, np.float64)
    np.testing.assert_allclose(slope, (plain(y + step) - plain(y - step)) / 2e-5, rtol=1e-2)


def test_maps_are_compared_by_both_divergences(draw):
    p, q = (jax.nn.softmax(jnp.asarray(draw.normal(size=(1, 2, 3, 4)), jnp.float32)) for _ in range(2))
    expected = np.mean(p * np.log(p / q) + q * np.log(q / p))
    np.testing.assert_allclose(divergence(p, q), expected, rtol=1e-4)
    hidden = p.at[..., 0].set(0.0)
    assert float(divergence(hidden, hidden)) == 0.0


def test_what_cannot_be_learned_is_refused(subject):
    with pytest.raises(UsageError, match="names none inside the blocks"):
        dataclasses.replace(STEP, kernels=("embedding",)).apply(subject, calibration())
    with pytest.raises(UsageError, match="group=24"):
        dataclasses.replace(STEP, layout=BitPlanes(2, 24)).apply(subject, calibration())
