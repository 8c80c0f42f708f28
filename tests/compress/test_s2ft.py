"""Rows that are tuned: their gradient, what the backward pass keeps, and what a tuned model is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.s2ft import (
    adapters,
    chosen,
    for_users,
    merged,
    partial_product,
    partly,
    put_in,
    taken_out,
    unchanged,
)
from effjax.compress.storage.trees import leaves_of
from effjax.compress.subject import leaf_at
from effjax.errors import UsageError
from effjax.layers.stored import Place, kernels
from tests.compress import tiny

KEY = jax.random.key(0)
SHARES = ((".*/mixer/output/kernel", 0.5), (".*/ffn/contract/kernel", 0.25))
OUTPUT, CONTRACT = "blocks/mixer/output/kernel", "blocks/ffn/contract/kernel"


@pytest.fixture
def network():
    """A tiny model with four heads that share two keys, its places, rows and some changes."""
    mixer = dict(kind="attention", heads=4, kv_heads=2, rotary_base=1e4, causal=True)
    subject = tiny.language(mixer=mixer)
    places = places_of(subject)
    rows = chosen(places, SHARES, KEY)
    return subject, places, rows, noise(unchanged(places, rows), 1)


def places_of(subject):
    return kernels(jax.eval_shape(subject.task.init, KEY, tiny.BATCH)["params"])


def noise(tree, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * draw.normal(size=leaf.shape), jnp.float32), tree)


def loss_of(subject, params):
    return subject.task.loss({"params": params}, tiny.BATCH, KEY)[0]["loss"].value()


def picked(kernel, rows, ins):
    """Rows of the matrices of a stacked kernel."""
    kernel = np.asarray(kernel)
    matrices = kernel.reshape(len(kernel), -1, *kernel.shape[1 + ins :])
    return np.stack([matrix[at] for matrix, at in zip(matrices, np.asarray(rows), strict=True)])


def test_the_gradient_is_that_of_the_same_rows_of_all(network):
    subject, _, rows, changes = network
    params = subject.params
    tuned = merged(params, changes, rows)
    here, slopes = jax.jit(jax.value_and_grad(lambda c: loss_of(subject, partly(params, c, rows))))(changes)
    there, full = jax.jit(jax.value_and_grad(lambda p: loss_of(subject, p)))(tuned)
    assert here == pytest.approx(float(there), rel=1e-6)
    for path, ins in ((OUTPUT, 2), (CONTRACT, 1)):
        expected = picked(leaf_at(full, path), leaf_at(rows, path), ins)
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(leaf_at(slopes, path), expected, rtol=1e-4, atol=1e-7)


def test_the_product_is_that_of_the_tuned_matrix_in_any_dtype(draw):
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    x, matrix, change, dy = array(7, 12), array(12, 5), array(3, 5), array(7, 5)
    rows = jnp.asarray([1, 4, 10], jnp.int32)
    y, back = jax.vjp(lambda x, change: partial_product(x, matrix, change, rows), x, change)
    tuned = np.asarray(matrix, np.float64)
    tuned[np.asarray(rows)] += np.asarray(change)
    np.testing.assert_allclose(y, np.asarray(x) @ tuned, rtol=1e-5, atol=1e-5)
    dx, d_change = back(dy)
    np.testing.assert_allclose(dx, np.asarray(dy) @ tuned.T, rtol=1e-5, atol=1e-5)
    expected = np.asarray(x)[:, np.asarray(rows)].T @ np.asarray(dy)
    np.testing.assert_allclose(d_change, expected, rtol=1e-5, atol=1e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (x, matrix, change))
    assert partial_product(*half, rows).dtype == jnp.bfloat16


def test_of_what_enters_only_the_tuned_columns_are_kept():
    x, matrix, change = jnp.ones((50, 12)), jnp.ones((12, 5)), jnp.ones((3, 5))
    rows = jnp.asarray([1, 4, 10], jnp.int32)
    _, back = jax.vjp(lambda x, change: partial_product(x, matrix, change, rows), x, change)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(back))
    assert kept == sorted([(50, 3), (12, 5), (3, 5), (3,)])
    _, back = jax.vjp(lambda x, matrix: x @ matrix, x, matrix)
    assert (50, 12) in [leaf.shape for leaf in jax.tree.leaves(back)], "all of it, where all is trained"


def test_changes_are_in_the_chosen_rows_alone(network):
    subject, _, rows, changes = network
    before, after = leaves_of(subject.params), leaves_of(merged(subject.params, changes, rows))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if path not in (OUTPUT, CONTRACT):
            np.testing.assert_array_equal(leaf, after[path])
            continue
        ins = 2 if path == OUTPUT else 1
        matrices = np.asarray(after[path] - leaf).reshape(len(leaf), -1, leaf.shape[-1])
        moved = [np.flatnonzero(matrix.any(-1)).tolist() for matrix in matrices]
        assert moved == np.asarray(leaf_at(rows, path)).tolist()
        np.testing.assert_allclose(
            picked(after[path] - leaf, leaf_at(rows, path), ins), leaf_at(changes, path), atol=1e-6
        )


def test_a_layer_that_asks_for_the_array_gets_the_tuned_one(network):
    subject, _, rows, changes = network
    tuned = merged(subject.params, changes, rows)
    held = partly(subject.params, changes, rows)
    for path in (OUTPUT, CONTRACT):
        np.testing.assert_array_equal(leaf_at(held, path).whole(jnp.float32), leaf_at(tuned, path))
        assert leaf_at(held, path).shape == leaf_at(tuned, path).shape


def test_adapters_go_in_and_out_to_the_bit(network):
    subject, _, rows, changes = network
    tuned = merged(subject.params, changes, rows)
    of = adapters(subject.params, changes, rows)
    jax.tree.map(np.testing.assert_array_equal, put_in(subject.params, of), tuned)
    jax.tree.map(np.testing.assert_array_equal, taken_out(tuned, of), subject.params)


def test_an_adapter_of_another_model_is_refused(network):
    subject, _, rows, changes = network
    of = adapters(subject.params, changes, rows)
    cut = jax.tree.map(lambda leaf: leaf[..., :8], subject.params)
    with pytest.raises(UsageError, match="its adapter rows of"):
        put_in(cut, of)


def test_adapters_of_other_rows_are_a_joint_model(network):
    subject, _, rows, changes = network
    one, other = (
        jax.tree.map(lambda leaf, cut=cut: leaf[:, cut], (changes, rows)) for cut in (np.s_[::2], np.s_[1::2])
    )
    params = subject.params
    both = put_in(put_in(params, adapters(params, *one)), adapters(params, *other))
    swapped = put_in(put_in(params, adapters(params, *other)), adapters(params, *one))
    joint = merged(params, changes, rows)
    jax.tree.map(np.testing.assert_array_equal, both, joint)
    jax.tree.map(np.testing.assert_array_equal, swapped, joint)


def test_many_users_at_once_get_what_each_gets_alone(draw):
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    x, matrix, changes = array(3, 4, 10), array(10, 6), array(3, 2, 6)
    rows = jnp.asarray([[0, 9], [3, 4], [9, 1]], jnp.int32)
    y = for_users(x, matrix, changes, rows)
    for user in range(3):
        alone = partial_product(x[user], matrix, changes[user], rows[user])
        np.testing.assert_allclose(y[user], alone, rtol=1e-4, atol=1e-5)


def test_permuted_heads_and_channels_change_nothing(network):
    """What the authors' layout rests on: matrices in another order, the same function and gradient."""
    subject, _, rows, changes = network
    heads = np.asarray([3, 2, 0, 1])  # two groups change places, and heads of one of them
    hidden = np.random.default_rng(2).permutation(32)
    orders = {
        "mixer/query": (2, heads),
        "mixer/key": (2, np.asarray([1, 0])),
        "mixer/value": (2, np.asarray([1, 0])),
        "mixer/output": (1, heads),
        "ffn/gate": (2, hidden),
        "ffn/expand": (2, hidden),
        "ffn/contract": (1, hidden),
    }
    turned = jax.tree.map(lambda leaf: leaf, subject.params)
    for name, (axis, order) in orders.items():
        branch, layer = name.split("/")
        for kind, leaf in turned["blocks"][branch][layer].items():
            at = axis if kind == "kernel" else 1
            if kind == "kernel" or axis == 2:  # biases of what is permuted go along
                turned["blocks"][branch][layer][kind] = jnp.take(leaf, order, axis=at)
    at = jax.tree.map(lambda leaf: leaf, rows)
    for path, order, size in ((OUTPUT, heads, 4), (CONTRACT, hidden, 1)):
        old = np.asarray(leaf_at(rows, path))
        new = np.argsort(order)[old // size] * size + old % size
        branch, layer = path.split("/")[1:3]
        at["blocks"][branch][layer]["kernel"] = jnp.asarray(new, jnp.int32)
    run = jax.jit(jax.value_and_grad(lambda c, p, r: loss_of(subject, partly(p, c, r))))
    here, slopes = run(changes, subject.params, rows)
    there, others = run(changes, turned, at)
    assert here == pytest.approx(float(there), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), slopes, others)


def test_whole_heads_are_drawn_as_many_in_each_layer(network):
    _, places, rows, _ = network
    heads = np.asarray(leaf_at(rows, OUTPUT)).reshape(2, 2, 4)
    assert (heads % 4 == np.arange(4)).all()
    assert (heads[..., 0] // 4 < 4).all()
    for path, count in ((OUTPUT, 8), (CONTRACT, 8)):
        at = np.asarray(leaf_at(rows, path))
        assert at.shape == (2, count)
        assert (np.diff(at) > 0).all()
    many = [leaf_at(chosen(places, SHARES, jax.random.key(i)), CONTRACT) for i in range(40)]
    assert len(np.unique(many)) == 32, "every channel has its turn"
    assert any((np.asarray(one)[0] != np.asarray(one)[1]).any() for one in many)


def test_the_worthiest_units_are_taken():
    place = Place((1, 3, 2, 5), ("layers", "heads", "head", "embed"), (3, 2), (5,), False, "output/kernel")
    worth = {"output/kernel": jnp.asarray([[1.0, 1.0, 3.0, 0.0, 0.0, 2.5]])}
    rows = chosen({"output/kernel": place}, (("output/kernel", 0.34),), KEY, worth)
    assert np.asarray(leaf_at(rows, "output/kernel")).tolist() == [[2, 3]], "heads by their sums"


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (((".*/contract/kernel", 0.0),), "share above 0"),
        (((".*/contract/kernel", 0.01),), "of the 32 units"),
        (((".*/contracts/kernel", 0.5),), "matches no"),
        ((("embedding", 0.5),), "is a table"),
    ],
)
def test_wrong_shares_are_refused(network, shares, message):
    _, places, _, _ = network
    table = Place((16, 8), ("vocab", "embed"), (8,), (16,), True, "embedding")
    with pytest.raises(UsageError, match=message):
        chosen({**places, "embedding": table}, shares, KEY)
