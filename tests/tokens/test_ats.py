import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import unflatten_dict

from effjax import measure
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.measure.adaptive import existing, macs_by_example
from effjax.models import KINDS
from effjax.tokens import ATS, ClassAttention, Schedule
from effjax.tokens.ats import sampled, significance

FIXTURE = Path(__file__).parent / "fixtures" / "adaptive.npz"
IMAGES = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))


def vit(**changes):
    """A toy with a class token and 16 patches."""
    block = dict(mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"))
    section = dict(kind="vit", patch=4, dim=16, depth=3, classes=5, block=block)
    return build_kind(KINDS, section | changes, "model")


def weights_of(model, sharpness=1.0):
    """Random weights, the head's among them; attention peaks where queries are long."""
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(1), IMAGES))
    params = variables["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
    params["blocks"]["mixer"]["query"]["kernel"] *= sharpness
    return variables


def counts(model, variables, images=IMAGES):
    """Patches of each picture behind each layer."""
    _, told = jax.jit(functools.partial(model.apply, mutable="tokens"))(variables, images)
    return {name: existing(np.asarray(origin)) - 1 for name, (origin,) in told["tokens"].items()}


def loops(scores, points, spread):
    """Inverse transform sampling, point by point."""
    order = np.argsort(scores, kind="stable")
    total = np.cumsum(scores[order])
    if spread == "ends":
        total = (total - total[0]) / (total[-1] - total[0])
        drawn = [total[1] + (1 - total[1]) * k / (points - 1) for k in range(points)]
    else:
        total = total / total[-1]
        drawn = [(2 * k - 1) / (2 * points) for k in range(1, points + 1)]
    nearest = {int(order[np.argmin(np.abs(total - u))]) for u in drawn}
    return np.isin(np.arange(len(scores)), list(nearest))


@pytest.mark.parametrize("spread", ["ends", "middles"])
@pytest.mark.parametrize("points", [3, 12, 40])
def test_sampler_is_inverse_transform_sampling(spread, points):
    scores = np.random.default_rng(points).exponential(size=(6, 25)).astype(np.float32) ** 2
    drawn = sampled(jnp.asarray(scores), jnp.ones(scores.shape, bool), points, spread)
    for row, expected in zip(np.asarray(drawn), scores, strict=True):
        np.testing.assert_array_equal(row, loops(expected.astype(np.float64), points, spread))


@pytest.mark.parametrize("spread", ["ends", "middles"])
def test_padding_and_scale_change_nothing(spread):
    scores = jax.random.exponential(jax.random.key(3), (2, 20)) ** 2
    alone = sampled(scores, jnp.ones((2, 20), bool), 15, spread)
    at = jnp.array([i for i in range(27) if i % 4 != 1][:20])
    padded = jnp.zeros((2, 27)).at[:, at].set(7 * scores)
    exists = jnp.zeros((2, 27), bool).at[:, at].set(True)
    among = sampled(padded, exists, 15, spread)
    np.testing.assert_array_equal(among[:, at], alone)
    assert int(among.sum()) == int(alone.sum())


def test_few_tokens_stay_where_few_are_significant():
    every = jnp.ones((1, 30), bool)
    flat = sampled(jnp.ones((1, 30)), every, 30, "middles")
    assert int(flat.sum()) == 30
    kept = [
        int(sampled(jnp.exp(-sharp * jnp.arange(30.0))[None], every, 30, "middles").sum())
        for sharp in (0.0, 0.1, 0.3, 1.0, 10.0)
    ]
    assert kept == sorted(set(kept), reverse=True)
    assert kept[0] == 30
    assert kept[-1] == 2
    assert int(sampled(jnp.ones((1, 30)), every, 7, "middles").sum()) == 7


def test_one_token_alone_stays():
    exists = jnp.arange(4)[None] == 2
    for spread in ("ends", "middles"):
        np.testing.assert_array_equal(sampled(jnp.zeros((1, 4)), exists, 4, spread), exists)


def test_significance_weighs_attention_by_the_length_of_values():
    attention = jax.nn.softmax(jax.random.normal(jax.random.key(4), (1, 2, 5, 5)))
    values = jax.random.normal(jax.random.key(5), (1, 5, 2, 3))
    exists = jnp.array([[True, True, True, False, True]])
    a, v = np.asarray(attention, np.float64)[0], np.asarray(values, np.float64)[0]
    expected = [sum(a[h, 0, n] for h in range(2)) * np.sqrt((v[n] ** 2).sum()) for n in range(5)]
    expected[3] = 0
    np.testing.assert_allclose(significance(attention, values, exists, True)[0], expected, rtol=1e-6)
    queries = [0, 1, 2, 4]
    expected = [a[:, queries, n].sum() * np.sqrt((v[n] ** 2).sum()) * (n != 3) for n in range(5)]
    np.testing.assert_allclose(significance(attention, values, exists, False)[0], expected, rtol=1e-6)


def test_even_significance_keeps_all_and_is_the_identity():
    model = vit()
    variables = weights_of(vit())
    mixer = variables["params"]["blocks"]["mixer"]
    mixer["query"]["kernel"] *= 0
    mixer["value"] = dict(kernel=0 * mixer["value"]["kernel"], bias=1 + mixer["value"]["bias"])
    same = model.clone(reduce=ATS(spread="middles")).apply(variables, IMAGES)
    np.testing.assert_allclose(same, model.apply(variables, IMAGES), atol=1e-6)


def test_published_code_is_equalled():
    held = np.load(FIXTURE)
    params = unflatten_dict({k[7:]: jnp.asarray(held[k]) for k in held if k.startswith("params/")}, sep="/")
    model = vit().clone(reduce=ATS(layers=(1, 2)))
    logits = model.apply({"params": params}, jnp.asarray(held["images"]))
    np.testing.assert_allclose(logits, held["ats"], atol=1e-5)
    found = counts(model, {"params": params}, jnp.asarray(held["images"]))
    np.testing.assert_array_equal(np.stack([found["layer_1"], found["layer_2"]], 1) + 1, held["ats_counts"])


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_buckets_change_nothing(pool):
    model, variables = vit(pool=pool, class_token=True), weights_of(vit(), 20.0)
    masked = model.clone(reduce=ATS(layers=(0, 2)))
    fast = model.clone(reduce=ATS(layers=(0, 2), buckets=(6, 12)))
    run = [jax.jit(functools.partial(m.apply, mutable="tokens")) for m in (masked, fast)]
    (expected, before), (logits, after) = (f(variables, IMAGES) for f in run)
    first = existing(np.asarray(before["tokens"]["layer_0"][0]))
    assert first.max() <= 13, "the toy must leave the full length"
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_gradients_flow_through_buckets():
    variables = weights_of(vit(), 20.0)

    def loss(reduce, params):
        return jnp.sum(vit().clone(reduce=reduce).apply({"params": params}, IMAGES) ** 2)

    slow, fast = (
        jax.jit(jax.grad(functools.partial(loss, ATS(layers=(0,), buckets=buckets))))(variables["params"])
        for buckets in ((), (12,))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), fast, slow)


def test_a_batch_does_not_change_a_picture():
    model = vit().clone(reduce=ATS(layers=(0, 1), buckets=(6,)))
    variables = weights_of(vit(), 20.0)
    run = jax.jit(model.apply)
    together = run(variables, IMAGES)
    for i in range(3):
        np.testing.assert_allclose(run(variables, IMAGES[i : i + 1])[0], together[i], atol=1e-5)


def test_gradient_is_that_of_finite_differences():
    model = vit().clone(reduce=ATS(layers=(1, 2)))
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), weights_of(vit(), 5.0))
        images = jnp.asarray(IMAGES[:1], jnp.float64)
        direction = jax.random.normal(jax.random.key(6), images.shape, jnp.float64)
        loss = jax.jit(lambda step: jnp.sum(jnp.sin(model.apply(variables, images + step * direction))))
        slope = jax.jvp(loss, (0.0,), (1.0,))[1]
        assert abs(slope - (loss(5e-4) - loss(-5e-4)) / 1e-3) < 1e-2 * abs(slope)


class Imposed(ClassAttention):
    """So many tokens less, chosen where ATS does."""

    place = "in_mixer"


def test_fewer_tokens_have_fewer_macs():
    model = vit()
    variables = weights_of(vit(), 20.0)
    half = model.clone(reduce=ClassAttention(keep=0.5, layers=(0, 2)))
    np.testing.assert_array_equal(
        macs_by_example(half, variables, IMAGES), measure.count(half.apply, variables, IMAGES[:1]).macs
    )
    sampling = model.clone(reduce=ATS(layers=(0, 2)))
    macs = macs_by_example(sampling, variables, IMAGES)
    left = counts(sampling, variables)

    # The same numbers, imposed on one picture.
    numbers = {0: 16 - left["layer_0"][1], 2: left["layer_0"][1] - left["layer_2"][1]}
    imposed = Schedule({layer: Imposed(remove=int(number)) for layer, number in numbers.items()})
    assert macs[1] == measure.count(model.clone(reduce=imposed).apply, variables, IMAGES[:1]).macs
    with pytest.raises(UsageError, match="reduces no tokens"):
        macs_by_example(model, variables, IMAGES)


def test_bfloat16_agrees():
    model = vit().clone(reduce=ATS(layers=(2,)))
    variables = weights_of(vit())
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (variables, IMAGES))
    out = jax.jit(model.apply)(*low)
    assert out.dtype == jnp.bfloat16
    assert jnp.all(jnp.isfinite(out))


def test_bad_input():
    with pytest.raises(UsageError, match=r"keep=1.5 is no share"):
        ATS(keep=1.5)
    with pytest.raises(UsageError, match=r"buckets=\(8, 4\) must be"):
        ATS(buckets=(8, 4))
    with pytest.raises(UsageError, match="layer 9 is not there"):
        ATS(layers=(9,)).points(4)


def test_schedules_collect_the_buckets_of_their_entries():
    schedule = Schedule({1: ATS(buckets=(4, 8)), 2: ATS(buckets=(8, 12)), 3: ClassAttention(keep=0.5)})
    assert schedule.buckets == (4, 8, 12)
    assert dataclasses.replace(schedule, entries={}).buckets == ()
