"""Attention over a sequence that devices share: queries stay where they are, keys come once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.mixers.dot_product import softmax_attention
from effjax.parallel.mesh import MeshShape, make_mesh
from effjax.parallel.sharding import activate, merge_rules
from effjax.plan import hlo
from effjax.plan.collectives import collectives, located

MESH = {"data": 1, "tensor": 2, "sequence": 4}
DRAW = np.random.default_rng(0)
Q, K, V = (np.float32(DRAW.normal(size=(2, 64, heads, 8))) for heads in (4, 2, 2))
BIAS = jnp.float32(DRAW.normal(size=(1, 4, 64, 64)))
MASK = jnp.asarray(DRAW.random((2, 1, 1, 64)) < 0.8)


def step(block, **options):
    def loss(q, k, v):
        y = softmax_attention(q, k, v, block=block, **options)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(causal=True, mask=None),
        dict(causal=True, mask=MASK, window=(9, 0)),
        dict(causal=False, mask=MASK, bias=BIAS),
    ],
    ids=["causal", "window", "bias"],
)
@pytest.mark.parametrize("block", [4, 12, 32])
def test_blocks_of_each_device_are_those_of_one(options, block):
    expected = step(64, **options)(Q, K, V)
    with activate(make_mesh(MeshShape(**MESH)), merge_rules({})):
        found = step(block, **options)(Q, K, V)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@functools.cache
def sent(block):
    mesh = make_mesh(MeshShape(**MESH))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence", "tensor"))
    with activate(mesh, merge_rules({})), located():
        placed = [jax.device_put(x, cut) for x in (Q, K, V)]
        compiled = step(block, causal=True, mask=None).lower(*placed).compile()
    found, unknown = collectives(hlo.parse(compiled.as_text()), dict(mesh.shape), 8)
    assert not unknown
    return {one.kind: one.bytes for one in found if one.axes == ("sequence",) and one.bytes > 100}


def test_keys_come_once_whatever_the_blocks():
    keys = 2 * 64 * 1 * 8 * 4  # bytes of those of one head, which a device has
    loss = 4  # rides along
    assert sent(4) == sent(8) == {"all-gather": 2 * keys, "all-reduce": 2 * keys + loss}
