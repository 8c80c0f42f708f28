import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.layers.norms import norm, norm_size
from effjax.layers.progressive import Progressive

X = 1 + 2 * jax.random.normal(jax.random.key(0), (4, 5, 6))
SETTING = Progressive(steps=4)


def drawn(kind):
    module = norm(kind, 1e-6, "norm")
    held = meta.unbox(module.init(jax.random.key(0), X))
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda p: np.float32(1 + 0.3 * draw.normal(size=p.shape)), held["params"])
    assert sum(p.size for p in jax.tree.leaves(params)) == norm_size(kind, 6)
    return {**held, "params": params}


def at_pass(variables, passes):
    stats = {**variables["batch_stats"], "passes": jnp.int32(passes)}
    return {**variables, "batch_stats": stats}


@functools.partial(jax.jit, static_argnames="setting")
def trained(variables, setting=SETTING):
    return norm(setting, 1e-6, "norm", train=True).apply(variables, X, mutable=["batch_stats"])


def test_it_goes_in_a_line_from_layer_norm_to_repbn():
    held = drawn(SETTING)
    first, _ = trained(held)
    layer = norm("layer", 1e-6, "norm").apply({"params": held["params"]["before"]}, X)
    np.testing.assert_allclose(first, layer, rtol=1e-5, atol=1e-6)
    last, _ = trained(at_pass(held, 4))
    mean, var = X.mean((0, 1), keepdims=True), X.var((0, 1), keepdims=True)
    p = held["params"]["after"]
    batch = (X - mean) / jnp.sqrt(var + 1e-5) * p["batch"]["scale"][None, None] + p["batch"]["bias"][
        None, None
    ]
    np.testing.assert_allclose(last, batch + p["eta"] * X, rtol=1e-4, atol=1e-5)
    for passes in (1, 2, 3):
        between, _ = trained(at_pass(held, passes))
        np.testing.assert_allclose(
            between, (1 - passes / 4) * first + passes / 4 * last, rtol=1e-5, atol=1e-5
        )


def test_training_passes_are_counted_and_evaluation_is_repbn_alone():
    held = drawn(SETTING)
    counts = []
    for _ in range(6):
        _, changed = trained(held)
        held = {**held, **changed}
        counts.append(int(held["batch_stats"]["passes"]))
    assert counts == [1, 2, 3, 4, 4, 4]
    evaluated = norm(SETTING, 1e-6, "norm").apply(held, X)
    alone = norm("rep_batch", 1e-5, "norm").apply(
        {name: held[name]["after"] for name in ("params", "batch_stats")}, X
    )
    np.testing.assert_allclose(evaluated, alone, rtol=1e-6)
    with pytest.raises(UsageError, match="steps=0 and warmup=0: give at least 1"):
        Progressive(steps=0)


def test_language_models_begin_with_an_rms_norm_alone_and_a_batch_norm_of_zeros():
    setting = Progressive(steps=4, before="rms", warmup=2, initial=0.0)
    initial = meta.unbox(norm(setting, 1e-6, "norm").init(jax.random.key(0), X))["params"]
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(initial["after"]))
    held = drawn(setting)
    rms = norm("rms", 1e-6, "norm").apply({"params": held["params"]["before"]}, X)
    outputs = [trained(at_pass(held, passes), setting)[0] for passes in range(7)]
    for passes, share in enumerate((1, 1, 1, 0.75, 0.5, 0.25, 0)):
        expected = share * rms + (1 - share) * outputs[6]
        np.testing.assert_allclose(outputs[passes], expected, rtol=1e-5, atol=1e-5)
    assert jnp.abs(outputs[6] - rms).max() > 0.1
    _, changed = trained(at_pass(held, 6), setting)
    assert int(changed["batch_stats"]["passes"]) == 6
