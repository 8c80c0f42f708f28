"""Low-rank adapters: the product, where they stand, and what they give back to a thresholded model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.compress.cats import calibrate, thresholded
from effjax.compress.lora import KERNELS, drawn, merged
from effjax.errors import UsageError
from effjax.matching import named_leaves
from tests.compress.test_cats import TOY, chains, loss_of, small, trained, variables

KEY = jax.random.key(0)


def test_the_product_is_added_axis_by_axis(draw):
    depth, c, h, d, f, r = 2, 4, 3, 2, 5, 2
    array = lambda *shape: jnp.float32(draw.normal(size=shape))
    params = {
        "mixer": {"query": {"kernel": array(depth, c, h, d)}, "output": {"kernel": array(depth, h, d, c)}},
        "ffn": {"gate": {"kernel": array(c, f)}},
        "norm": {"scale": array(depth, c)},
    }
    rules = ((".*/query/kernel", "in out out"), (".*/output/kernel", "in in out"), ("ffn/.*", "in out"))
    thin = drawn(params, rules, r, KEY)
    thin = jax.tree.map(lambda leaf: array(*leaf.shape), thin)
    tuned = merged(params, thin, 0.5)
    a, b = thin["mixer"]["query"]["kernel"]["a"], thin["mixer"]["query"]["kernel"]["b"]
    more = np.einsum("lcr,lrhd->lchd", a, b)
    np.testing.assert_allclose(
        tuned["mixer"]["query"]["kernel"], params["mixer"]["query"]["kernel"] + 0.5 * more, rtol=1e-5
    )
    a, b = thin["mixer"]["output"]["kernel"]["a"], thin["mixer"]["output"]["kernel"]["b"]
    more = np.einsum("lhdr,lrc->lhdc", a, b)
    np.testing.assert_allclose(
        tuned["mixer"]["output"]["kernel"], params["mixer"]["output"]["kernel"] + 0.5 * more, rtol=1e-5
    )
    a, b = thin["ffn"]["gate"]["kernel"]["a"], thin["ffn"]["gate"]["kernel"]["b"]
    np.testing.assert_allclose(
        tuned["ffn"]["gate"]["kernel"], params["ffn"]["gate"]["kernel"] + 0.5 * a @ b, rtol=1e-5
    )
    np.testing.assert_array_equal(tuned["norm"]["scale"], params["norm"]["scale"])
    assert np.linalg.matrix_rank(tuned["ffn"]["gate"]["kernel"] - params["ffn"]["gate"]["kernel"]) == r


def test_fresh_adapters_change_nothing_and_are_few():
    params = variables()["params"]
    thin = drawn(params, KERNELS, 4, KEY)
    tuned = merged(params, thin, 2.0)
    jax.tree.map(np.testing.assert_array_equal, tuned, params)
    assert {path.rsplit("/", 2)[0] for path in named_leaves(thin)} == {
        *(f"blocks/mixer/{name}" for name in ("query", "value")),
        *(f"blocks/ffn/{name}" for name in ("gate", "expand", "contract")),
    }
    # Of each kernel [i, o] of each of three layers r (i + o) numbers: two of 32 x 32, three of 32 x 96.
    assert sum(leaf.size for leaf in jax.tree.leaves(thin)) == 3 * 4 * (2 * 64 + 3 * 128)


def test_a_is_drawn_with_the_variance_of_the_authors():
    params = {"gate": {"kernel": jnp.zeros((300, 10))}}
    a = drawn(params, (("gate/kernel", "in out"),), 64, KEY)["gate"]["kernel"]["a"]
    assert float(jnp.var(a)) == pytest.approx(1 / (3 * 300), rel=0.02)


@pytest.mark.slow
def test_adapters_give_back_most_of_what_thresholds_cost():
    held, test = trained(), chains(jax.random.key(5), 64)
    thresholds = calibrate(TOY, held, [{"tokens": chains(jax.random.key(6), 32)}], 0.9)
    sparse, cut = thresholded(TOY, held, thresholds)
    thin = drawn(cut["params"], KERNELS, 4, KEY)
    tuned = lambda thin: {**cut, "params": merged(cut["params"], thin, 2.0)}
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 300))

    def step(state, key):
        thin, moments = state
        slope = jax.grad(lambda thin: loss_of(sparse, tuned(thin), chains(key, 16)))(thin)
        change, moments = optimizer.update(slope, moments)
        return (optax.apply_updates(thin, change), moments), None

    @jax.jit
    def train(thin):
        keys = jax.random.split(jax.random.key(8), 300)
        return jax.lax.scan(step, (thin, optimizer.init(thin)), keys)[0][0]

    loss = jax.jit(loss_of, static_argnums=0)
    dense, before, after = (
        float(jnp.exp(loss(*pair, test)))
        for pair in ((TOY, held), (sparse, cut), (sparse, tuned(train(thin))))
    )
    assert before > dense
    assert after - dense < 0.5 * (before - dense), (dense, before, after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: drawn(p, KERNELS, 0, KEY), "rank=0"),
        (lambda p: drawn(p, ((".*kernel", "out in"),), 2, KEY), "inputs first"),
        (lambda p: drawn(p, ((".*/gate/kernel", "in in in out"),), 2, KEY), "fewer axes"),
        (lambda p: drawn(p, ((".*/gates/kernel", "in out"),), 2, KEY), "matches no parameter"),
        (lambda p: drawn(p, (), 2, KEY), "give rules that choose some"),
    ],
)
def test_a_wrong_request_is_one_clear_message(change, message):
    with pytest.raises(UsageError, match=message):
        change(meta.unbox(jax.eval_shape(small().init, KEY, jnp.zeros((1, 4), int)))["params"])
