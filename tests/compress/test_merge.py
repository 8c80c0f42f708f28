"""What is merged: layers, heads, stages. Whole networks are in tests/models/test_published_code.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.merge import merge, plan
from effjax.errors import UsageError
from effjax.layers.conv import ConvNorm
from effjax.layers.downsample import Convs
from effjax.models.heads import Linear

X = jax.random.normal(jax.random.key(0), (2, 6, 5, 4))


def drawn(variables):
    """Every leaf at random, variances positive."""
    leaves, structure = jax.tree.flatten(meta.unbox(variables))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draws = [
        jax.random.uniform(k, leaf.shape, minval=0.5, maxval=1.5)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draws)


@pytest.mark.parametrize("distillation", [False, True])
def test_a_head_takes_its_norm_up(distillation):
    head = Linear(norm="batch", place="after_pool", distillation=distillation)
    variables = drawn(head.init(jax.random.key(0), X, 3))
    merged, folded = merge(head, variables)
    assert set(folded) == {"params"}
    assert set(folded["params"]) <= {"classifier", "distillation_classifier"}
    np.testing.assert_allclose(merged.apply(folded, X, 3), head.apply(variables, X, 3), rtol=1e-5)


def test_only_batch_norms_are_taken_up():
    convs = Convs(
        (ConvNorm(6, 3, 2, activation="relu"), ConvNorm(norm="layer"), ConvNorm(3, 1, depthwise=False))
    )
    variables = drawn(convs.init(jax.random.key(0), X, 5))
    merged, folded = merge(convs, variables)
    assert [layer.merged for layer in merged.layers] == [True, False, True]
    assert "norm" in folded["params"]["layers_1"]
    assert "batch_stats" not in folded
    np.testing.assert_allclose(merged.apply(folded, X, 5), convs.apply(variables, X, 5), rtol=1e-4, atol=1e-5)
    for head in (Linear(norm="batch"), Linear()):
        assert plan(head)[0] is head


def test_a_norm_over_channels_cannot_be_part_of_a_convolution():
    with pytest.raises(UsageError, match="norm='layer' cannot be part of a convolution"):
        ConvNorm(norm="layer", merged=True)


def test_weights_as_they_were_saved_are_taken_too():
    conv = ConvNorm(3)
    variables = drawn(conv.init(jax.random.key(0), X))
    _, folded = merge(conv, jax.tree.map(np.asarray, variables))
    assert all(isinstance(leaf, jnp.ndarray) for leaf in jax.tree.leaves(folded))
