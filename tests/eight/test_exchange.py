"""Experts on eight devices: the same numbers on every mesh, and what travels is what was said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.ffn import ExchangedMixture, LSHMixture, Mixture
from effjax.parallel.mesh import MeshShape, make_mesh
from effjax.parallel.sharding import activate, merge_rules
from effjax.plan import hlo
from effjax.plan.collectives import collectives, located

FIELDS = dict(experts=8, chosen=2, hidden=12, shared=4)
X = jax.random.normal(jax.random.key(0), (8, 6, 16))

# Attention's mesh, and which of its axes cut experts and their channels.
FOLDINGS = {
    "an axis of its own": ({"data": 1, "expert": 8}, {}),
    "of its own and tensor": ({"data": 2, "tensor": 2, "expert": 2}, {}),
    "data": ({"data": 8}, {"expert": "data"}),
    "fsdp and tensor": ({"data": 1, "fsdp": 4, "tensor": 2}, {"expert": ("fsdp", "tensor")}),
    "all of attention's": (
        {"data": 2, "tensor": 2, "sequence": 2},
        {"expert": ("data", "sequence", "tensor")},
    ),
    "sequence, with tensor in each": ({"data": 2, "tensor": 2, "sequence": 2}, {"expert": "sequence"}),
    "tensor, whole each": (
        {"data": 2, "tensor": 2, "sequence": 2},
        {"expert": "tensor", "expert_mlp": None},
    ),
    "none, tensor in each": ({"data": 4, "tensor": 2}, {"expert": None}),
}


@functools.cache
def variables():
    shapes = meta.unbox(jax.eval_shape(Mixture(**FIELDS).init, jax.random.key(1), X))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape, scale=0.4)), shapes)


def with_gradients(module, x=X):
    def loss(variables, x):
        y = module.apply(variables, x, train=True)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables(), x)


@functools.cache
def on_one_device(factor):
    return with_gradients(Mixture(**FIELDS, capacity=factor))


@pytest.mark.parametrize("factor", [None, 0.75], ids=["dropless", "dropping"])
@pytest.mark.parametrize("folding", FOLDINGS)
def test_outputs_and_gradients_are_those_of_one_device(folding, factor):
    expected = on_one_device(factor)
    sizes, rules = FOLDINGS[folding]
    with activate(make_mesh(MeshShape(**sizes)), merge_rules(rules)):
        found = with_gradients(ExchangedMixture(**FIELDS, capacity=factor))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_means_of_groups_are_those_of_one_device():
    lsh = LSHMixture(**FIELDS, rate=0.5, group=6)
    expected = with_gradients(lsh)
    with activate(make_mesh(MeshShape()), merge_rules({"expert": "data"})):
        found = with_gradients(lsh)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def sent(module, x, sizes, rules):
    """Bytes of a group that travel between experts in one forward pass."""
    mesh = make_mesh(MeshShape(**sizes))
    with activate(mesh, merge_rules(rules)), located():
        compiled = jax.jit(functools.partial(module.apply, train=True)).lower(variables(), x).compile()
    found, unknown = collectives(hlo.parse(compiled.as_text()), dict(mesh.shape), 8)
    assert not unknown
    return sum(one.bytes * one.group for one in found if one.kind == "all-to-all")


def test_what_travels_is_places_times_channels_there_and_back():
    x = jnp.tile(X, (1, 8, 1))  # 48 tokens a device
    on_data = {"data": 8}, {"expert": "data"}
    each = 2 * 8 * (8 * 16) * 4  # there and back, from 8 devices a place of 8 experts of 16 float32 channels
    assert sent(ExchangedMixture(**FIELDS), x, *on_data) == each * 48
    assert sent(ExchangedMixture(**FIELDS, room=1.25), x, *on_data) == each * 15  # 1.25 x 2 x 48 / 8
    assert sent(LSHMixture(**FIELDS, rate=0.25), x, *on_data) == each * 3


def test_a_batch_that_the_mesh_does_not_divide_is_left_to_the_compiler():
    expected = with_gradients(Mixture(**FIELDS), X[:3])
    with activate(make_mesh(MeshShape()), merge_rules({"expert": "data"})):
        found = with_gradients(ExchangedMixture(**FIELDS), X[:3])
    np.testing.assert_allclose(found[0][1], expected[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rules", "fields", "match"),
    [
        ({"expert": None, "expert_mlp": "data"}, {}, "expert_mlp cuts channels of experts along 'data'"),
        ({"expert": "data"}, {"experts": 6}, "experts=6 of the mixture is not divided by the 8 devices"),
    ],
)
def test_a_folding_that_does_not_fit_is_refused(rules, fields, match):
    module = ExchangedMixture(**{**FIELDS, **fields})
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(1), X))
    with (
        activate(make_mesh(MeshShape()), merge_rules(rules)),
        pytest.raises(UsageError, match=match),
    ):
        jax.eval_shape(module.apply, shapes, X)
