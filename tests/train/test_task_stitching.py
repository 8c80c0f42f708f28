"""Every member of a family is the ordinary network that stitching makes, and trains what it goes through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.steps.stitch import Member
from effjax.compress.stitching import Pair, fitted, streams
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError
from effjax.train.tasks import served
from effjax.train.tasks.classification import Classification
from effjax.train.tasks.distillation import divergence
from effjax.train.tasks.mean import values
from effjax.train.tasks.stitching import Stitching
from tests.tokens.tiny import images, vit

LARGE, SMALL = vit(depth=2), vit(depth=2, dim=8)
BATCH = {"image": images(3), "label": jnp.array([0, 3, 1]), "mask": jnp.ones(3)}
TASK = Stitching(LARGE, SMALL, weights="large", small_weights="small", smoothing=0.1)


@pytest.fixture(scope="module")
def held():
    """Variables, none of them zero."""
    made = meta.unbox(jax.jit(TASK.init)(jax.random.key(0), BATCH))
    keys = iter(jax.random.split(jax.random.key(1), 500))
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), made)


def answer(network):
    return jax.jit(network.model.apply)(network.variables, BATCH["image"])


def test_the_family_is_its_paths_between_both_networks(held):
    assert TASK.members == ((2, None), (1, 0), (1, 1), (2, 0), (2, 1), (0, 0))
    assert set(held["params"]["maps"]) == {"map_0"}
    three = Stitching(vit(depth=3), vit(depth=3, dim=8))
    made = jax.eval_shape(three.init, jax.random.key(0), BATCH)
    assert set(made["params"]["maps"]) == {"map_0", "map_1"}
    assert set(made) == {"params"}  # no folders, no teacher


def test_members_are_what_stitching_makes(held):
    params = held["params"]
    small = Subject(Classification(SMALL), {"params": params["front"]}, BATCH)
    large = Subject(Classification(LARGE), {"params": params["back"]}, BATCH)
    by_hand = Pair.of(small, large).path(1, 0, params["maps"]["map_0"])
    for path, wanted in (((1, 0), by_hand), ((0, 0), large), ((2, None), small)):
        np.testing.assert_allclose(answer(TASK.member(held, BATCH, path)), answer(wanted), rtol=1e-6)
    assert jnp.abs(answer(by_hand) - answer(large)).max() > 1e-2


def test_a_step_trains_what_its_paths_go_through(held):
    batch = TASK.prepare(BATCH, jax.random.key(2))

    def total(params, task, key):
        means, _ = task.loss({**held, "params": params}, batch, key)
        return values(means)["loss"]

    one = jax.jit(jax.grad(total), static_argnums=1)
    seen = set()
    for number in range(12):
        key = jax.random.key(number)
        drawn = int(jax.random.choice(jax.random.split(key)[0], len(TASK.members), (1,), replace=False)[0])
        at, to = TASK.members[drawn]
        found = one(held["params"], TASK, key)
        norm = lambda tree: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))
        assert (norm(found["front"]) > 0) == (at > 0)
        assert (norm(found["back"]) > 0) == (to is not None)
        assert (norm(found["maps"]) > 0) == (at > 0 and to is not None)
        if at == 1:
            first, second = (jax.tree.map(lambda x, i=i: x[i], found["front"]["blocks"]) for i in (0, 1))
            assert norm(first) > 0 == norm(second)
        seen.add((at, to))
    assert {(1, 0), (0, 0), (2, None)} & seen
    # All members at once: the mean of each alone.
    whole = dataclasses.replace(TASK, draws=len(TASK.members))
    got = jax.jit(total, static_argnums=1)(held["params"], whole, jax.random.key(0))
    goals = answer(Subject(Classification(LARGE), held["teacher"], BATCH))
    wanted = []
    for path in TASK.members:
        logits = answer(TASK.member(held, BATCH, path))
        entropy = -jnp.sum(batch["target"] * jax.nn.log_softmax(logits), axis=-1)
        wanted.append(jnp.mean(entropy + divergence(goals, logits, 1.0)))
    np.testing.assert_allclose(got, np.mean(wanted), rtol=1e-5)


def test_metrics_are_those_of_every_member(held):
    found = values(jax.jit(TASK.metrics)(held, BATCH))
    each = []
    for (at, to), name in zip(TASK.members, ("2_end", "1_0", "1_1", "2_0", "2_1", "0_0"), strict=True):
        member = TASK.member(held, BATCH, (at, to))
        own = values(member.task.metrics(member.variables, BATCH))
        assert found[f"accuracy_{name}"] == pytest.approx(own["accuracy"])
        each.append(own["loss"])
    assert found["loss"] == pytest.approx(np.mean(each), rel=1e-5)
    np.testing.assert_array_equal(
        TASK.answers(held, BATCH), jnp.argmax(answer(TASK.member(held, BATCH, (0, 0))), -1)
    )


def test_maps_begin_as_the_mean_of_least_squares(held):
    given = {"teacher": held["teacher"], "start": held["start"]}
    made = TASK.inherit(None, given, lambda: iter([BATCH] * 9))
    assert made["front"] is given["start"]["params"]
    assert made["back"] is given["teacher"]["params"]
    rows = [BATCH] * TASK.batches
    left = streams(Subject(Classification(SMALL), held["start"], BATCH), rows)
    entering = streams(Subject(Classification(LARGE), held["teacher"], BATCH), rows)
    each = [fitted(left[at], entering[to], TASK.ridge) for at, to in ((1, 0), (1, 1), (2, 0), (2, 1))]
    for name, parts in zip(("kernel", "bias"), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(made["maps"]["map_0"][name], np.mean(parts, axis=0), rtol=1e-4, atol=1e-5)
    assert Stitching(LARGE, SMALL).inherit(None, {}, lambda: iter(())) == {}


def test_a_member_is_an_ordinary_network(held):
    told = []
    calibration = Calibration(lambda: iter([BATCH]), jax.random.key(0), told.append)
    subject = Subject(TASK, held, BATCH)
    made = Member(1, 1).apply(subject, calibration)
    assert type(made.task) is Classification
    assert made.task.smoothing == 0.1
    np.testing.assert_allclose(answer(made), answer(TASK.member(held, BATCH, (1, 1))), rtol=1e-6)
    assert "path 1, 1" in told[0]
    assert set(served(TASK, held)) == {"params"}
    with pytest.raises(UsageError, match="no path of this family"):
        Member(1, 5).apply(subject, calibration)
    with pytest.raises(UsageError, match="kind='stitch'"):
        Member(1, 1).apply(made, calibration)


def test_what_is_no_family_is_said():
    with pytest.raises(UsageError, match="both networks, or of none"):
        Stitching(LARGE, SMALL, weights="large")
    with pytest.raises(UsageError, match="the 6 members"):
        Stitching(LARGE, SMALL, draws=7)
