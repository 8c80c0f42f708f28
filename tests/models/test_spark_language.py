"""Spark Transformer as a language model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language.spark import get_config
from effjax.compress.rows import by_rows
from effjax.experiment import resolve

TOKENS = jax.random.randint(jax.random.key(0), (1, 20), 0, 256)


@functools.cache
def made():
    model = resolve(get_config("smoke")).model
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(1), TOKENS))
    draw = np.random.default_rng(2)
    return model, jax.tree.map(lambda leaf: np.float32(0.3 * draw.normal(size=leaf.shape)), shapes)


@pytest.mark.parametrize("turned", [False, True])
def test_cached_decoding_equals_the_whole(turned):
    model, variables = made()
    whole = jax.jit(model.apply)(variables, TOKENS)
    assert np.abs(whole).max() > 1.0
    if turned:
        model, variables = by_rows(model, variables)
    step = jax.jit(functools.partial(model.apply, method="step"))
    caches, logits = model.init_cache(1, 20), []
    for cut in (slice(0, 6), *(slice(i, i + 1) for i in range(6, 20))):
        new, caches = step(variables, TOKENS[:, cut], caches)
        logits.append(new)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, rtol=1e-3, atol=1e-3)


def test_the_past_does_not_see_the_future():
    model, variables = made()
    apply = jax.jit(model.apply)
    before, after = apply(variables, TOKENS), apply(variables, TOKENS.at[:, 12].add(1) % 256)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before - after)[:, 12:].max(axis=(0, 2)).min() > 1e-4


def test_both_kinds_of_sparsity_are_at_work():
    model, variables = made()
    block = model.block
    every = model.clone(
        block=block.clone(mixer=block.mixer.clone(active=64), ffn=block.ffn.clone(active=144))
    )
    fewer_keys = model.clone(block=block.clone(ffn=block.ffn.clone(active=144)))
    logits = [jax.jit(m.apply)(variables, TOKENS) for m in (every, fewer_keys, model)]
    assert np.abs(logits[0] - logits[1])[:, 8:].max() > 1e-2
    # Up to `active` tokens all keys count.
    np.testing.assert_allclose(logits[0][:, :8], logits[1][:, :8], rtol=1e-4, atol=1e-4)
    assert np.abs(logits[1] - logits[2]).max() > 1e-2


def test_pydocs_has_the_parameters_of_its_dense_twin():
    from configs.language import lm

    def parameters(config):
        model = resolve(config).model
        return sum(
            leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
        )

    assert parameters(get_config("pydocs")) == parameters(lm.get_config("pydocs"))
