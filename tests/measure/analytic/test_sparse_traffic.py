"""What sparse layers read, against their own parameters and against draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import Memory, Mixture
from effjax.measure.analytic.sparse_traffic import Sparse

LAYERS = [
    Memory(9, 4, 6, 8, 4, heads=2, hidden=10),
    Memory(9, 4, 6, 8, rank=3, cores=4),
    Memory(9, 4, 6, 8, score="sum"),
    Mixture(5, 2, 12),
    Mixture(5, 2, 12, shared=7, shared_gate=True),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_parameters_are_those_of_the_layer(layer):
    shapes = meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 3, 16))))["params"]
    assert Sparse.of(layer, 16).parameters == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_parts_touched_are_those_of_random_draws():
    sparse = Sparse(parts=40, taken=3, part=1, common=0)
    draw = np.random.default_rng(0)
    for tokens in (1, 7, 30):
        seen = [
            len(np.unique([draw.choice(40, 3, replace=False) for _ in range(tokens)])) for _ in range(400)
        ]
        assert sparse.touched(tokens) == pytest.approx(np.mean(seen), rel=0.03)


def test_a_memory_reads_less_where_few_tokens_come_at_once():
    # As many parameters and as many active: two of eight experts, and rows of a memory.
    dim = 1024
    mixture = Sparse.of(Mixture(8, 2, 1024), dim)
    memory = Sparse.of(Memory(256, 32, 256, 192, 192, hidden=1408), dim)
    assert memory.parameters == pytest.approx(mixture.parameters, rel=0.25)
    assert memory.active == pytest.approx(mixture.active, rel=0.25)
    ratios = [mixture.bytes(tokens) / memory.bytes(tokens) for tokens in (1, 8, 64, 10**6)]
    assert ratios[1] > 2.5
    assert ratios[2] > ratios[3]
    assert ratios[3] == pytest.approx(mixture.parameters / memory.parameters)


def test_biases_are_refused():
    with pytest.raises(UsageError, match="biases"):
        Sparse.of(Mixture(5, 2, 12, gated=False, use_bias=True), 16)
