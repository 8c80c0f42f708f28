"""The bag, its plans and schedules, through a ViT of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.measure.cost import count
from effjax.tokens import ClassAttention, RandomDrop, Restore, Schedule, Tokens, ToMe
from effjax.tokens.assignment import Assignment, Mixture, apply
from tests.tokens.toy import IMAGES, difference, params_of, run, vit

X = jax.random.normal(jax.random.key(0), (2, 7, 3))


def test_dropped_tokens_have_no_place_and_cannot_be_restored():
    tokens = Tokens.of(X, ends=(1, 1))
    plan = Assignment(jnp.array([[0, 3], [2, 4]]), jnp.array([[1, 2, 4], [0, 1, 3]]))
    after = apply(plan, tokens, False)
    np.testing.assert_array_equal(after.origin, [[0, 1, -1, -1, 2, -1, 3], [0, -1, -1, 1, -1, 2, 3]])
    np.testing.assert_array_equal(after.sources(), [[0, 1, 4, 6], [0, 3, 5, 6]])
    np.testing.assert_array_equal(after.x[0], X[0, jnp.array([0, 1, 4, 6])])
    assert float(after.size.sum()) == 8.0
    with pytest.raises(UsageError, match="cannot be restored"):
        after.restored()


def test_merged_tokens_are_restored_as_copies_through_two_reductions():
    tokens = Tokens.of(X)
    first = apply(
        Assignment(jnp.array([[0, 1, 2, 3, 4]] * 2), jnp.array([[5, 6]] * 2), jnp.array([[0, 1]] * 2)),
        tokens,
        True,
    )
    second = apply(
        Assignment(jnp.array([[2, 1, 0]] * 2), jnp.array([[3, 4]] * 2), jnp.array([[0, 2]] * 2)), first, True
    )
    np.testing.assert_array_equal(second.origin[0], [2, 1, 0, 0, 2, 2, 1])
    groups = {0: (2, 3), 1: (1, 6), 2: (0, 4, 5)}
    back = second.restored()
    for members in groups.values():
        for member in members:
            np.testing.assert_allclose(back.x[:, member], X[:, members, :].mean(1), rtol=1e-5)
    assert back.whole


def test_a_mixture_is_its_matrix_forth_and_back():
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(1), (2, 3, 6)))
    back = jax.nn.softmax(jax.random.normal(jax.random.key(2), (2, 6, 3)))
    after = jax.jit(lambda x: apply(Mixture(weights, back=back), Tokens.of(x, ends=(1, 0)), False))(X)
    np.testing.assert_allclose(after.x[:, 1:], weights @ X[:, 1:], rtol=1e-5)
    np.testing.assert_array_equal(after.x[:, 0], X[:, 0])
    np.testing.assert_allclose(after.size.sum(1), 7.0, rtol=1e-6)
    np.testing.assert_array_equal(after.origin[:, 1:] - 1, weights.argmax(1))
    np.testing.assert_allclose(after.restored().x[:, 1:], back @ weights @ X[:, 1:], rtol=1e-5)
    merged = Assignment(jnp.array([[0, 1]] * 2), jnp.array([[2]] * 2), jnp.array([[1]] * 2))
    twice = apply(merged, after, False)
    step = np.array([[1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(twice.restored().x[:, 1:], back @ step @ twice.x[:, 1:], rtol=1e-5)


PLACES = {
    "class": dict(),
    "distillation": dict(distillation=True),
    "registers": dict(registers=3, class_token=True),
    "mean": dict(pool="mean"),
    "middle": dict(class_place="middle"),
}


@pytest.mark.parametrize("fields", PLACES.values(), ids=PLACES)
def test_every_kind_of_vit_is_reduced_with_the_parameters_it_has(fields):
    params, model = params_of(**fields), vit(**fields)
    whole = run(model, params)
    fast = model.clone(reduce=ToMe(keep=0.8))
    got, sown = run(fast, params, mutable=["tokens"])
    assert got.shape == whole.shape
    assert 1e-4 < difference(got, whole) < 2.0
    shapes = meta.unbox(jax.eval_shape(fast.init, jax.random.key(0), IMAGES)["params"])
    assert jax.tree.map(jnp.shape, params["params"]) == jax.tree.map(jnp.shape, shapes)
    prefix = 0 if "class_place" in fields else model.prefix
    left = 37 - prefix if prefix == 0 and "pool" not in fields else 36
    for layer in range(2):
        left -= left - int(np.ceil(round(left * 0.8, 6)))
        (origin,) = sown["tokens"][f"layer_{layer}"]
        assert int(origin.max()) + 1 == left + prefix


def test_bfloat16_stays_near_float32():
    params = params_of()
    fast = vit().clone(reduce=Schedule({1: ToMe(keep=0.6)}))
    half = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    low = run(fast, half(params), half(IMAGES)).astype(jnp.float32)
    assert difference(low, run(fast, params)) <= 0.05


def test_a_schedule_restores_for_dense_outputs():
    params = params_of(pool="none", class_token=True)
    model = vit(pool="none", class_token=True)
    fast = model.clone(reduce=Schedule({0: ToMe(remove=9), 1: Restore()}))
    assert run(fast, params).shape == run(model, params).shape == (2, 37, 5)
    last = model.clone(reduce=Schedule({"1": ToMe(remove=9), "2": Restore()}))
    last = run(last, params)
    assert len(np.unique(np.asarray(last[0]), axis=0)) == 28


def test_depth_stays_a_scan_between_the_points():
    params = params_of(depth=8)
    fast = vit(depth=8).clone(reduce=Schedule({3: ToMe(remove=9)}))
    text = str(jax.make_jaxpr(lambda p: fast.apply(p, IMAGES))(params))
    assert [f"length={n}" in text for n in (3, 4)] == [True, True]
    assert text.count("scan[") == 2


def test_macs_are_those_of_the_formula():
    """Attention before the reduction, FFN behind it: 4 n d^2 + 2 n^2 d and 8 n d^2."""
    params, fast = params_of(), vit().clone(reduce=Schedule({1: RandomDrop(remove=12)}))
    n = [37, 37]
    m = [37, 25]
    blocks = sum(4 * a * 24**2 + 2 * a * a * 24 + 8 * b * 24**2 for a, b in zip(n, m, strict=True))
    assert count(fast.apply, params, IMAGES[:1]).macs == blocks + 36 * 12 * 24 + 24 * 5


def test_random_dropping_differs_by_layer_and_example_and_repeats():
    params, fast = params_of(), vit().clone(reduce=RandomDrop(keep=0.5, layers=(0, 1)))
    first, sown = run(fast, params, mutable=["tokens"])
    again = run(fast, params)
    np.testing.assert_array_equal(first, again)
    (origin,) = sown["tokens"]["layer_0"]
    assert (np.asarray(origin[0]) != np.asarray(origin[1])).any()


def test_what_the_class_token_looks_at_stays():
    params = params_of()
    fast = vit().clone(reduce=ClassAttention(keep=0.25, layers=(0,)))
    _, sown = run(fast, params, mutable=["tokens"])
    block = jax.tree.map(lambda leaf: leaf[0], params["params"]["blocks"])
    model = vit()
    p = params["params"]
    patches = IMAGES.reshape(2, 6, 2, 6, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 36, 12)
    embed = p["embed"]["projection"]
    x = jnp.einsum("bnp,pc->bnc", patches, embed["kernel"].reshape(12, 24)) + embed["bias"][None, None]
    x = (
        jnp.concatenate([jnp.broadcast_to(p["class_token"][None], (2, 1, 24)), x], axis=1)
        + p["positions"][None]
    )
    h = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + model.block.epsilon)
    h = h * block["mixer_norm"]["scale"][None, None] + block["mixer_norm"]["bias"][None, None]
    q, k = (
        jnp.einsum("bnc,chd->bnhd", h, block["mixer"][name]["kernel"])
        + block["mixer"][name]["bias"][None, None]
        for name in ("query", "key")
    )
    attention = jax.nn.softmax(jnp.einsum("bhd,bnhd->bhn", q[:, 0], k) / jnp.sqrt(8.0)).mean(1)[:, 1:]
    best = np.sort(np.argsort(-np.asarray(attention), axis=-1)[:, :9], axis=-1)
    (origin,) = sown["tokens"]["layer_0"]
    for b in range(2):
        np.testing.assert_array_equal(np.nonzero(np.asarray(origin)[b, 1:] >= 0)[0], best[b])


LINEAR = dict(block=dict(mixer=dict(kind="simplified_linear", heads=3), ffn=dict(kind="mlp")), pool="mean")


@pytest.mark.parametrize(
    ("fields", "reduce", "message"),
    [
        (dict(), Schedule({7: ToMe(remove=1)}), "layer 7 is not there: the network has 2 layers"),
        (dict(), Schedule({"last": ToMe(remove=1)}), "'last' names no layer"),
        (dict(pool="max"), ToMe(remove=1), "pool='max' knows no sizes"),
        (LINEAR, ToMe(remove=1), "ToMe reads keys, which SimplifiedLinear does not have"),
    ],
)
def test_what_does_not_go_together_is_said(fields, reduce, message):
    with pytest.raises(UsageError) as refusal:
        jax.eval_shape(vit(**fields).clone(reduce=reduce).init, jax.random.key(0), IMAGES)
    assert message in str(refusal.value)
