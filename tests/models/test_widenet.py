"""WideNet: one attention and one mixture for all blocks, with norms of each block's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.widenet import get_config
from effjax.experiment import resolve
from effjax.ffn import MLP
from effjax.mixers.context import Context
from effjax.train.tasks import Classification

X = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
DEPTH = 2


def made(**fields):
    """The toy with other fields of its mixture, and parameters away from where they start."""
    model = resolve(get_config("smoke")).model
    block = model.block.clone(ffn=model.block.ffn.clone(**fields))
    model = model.clone(block=block)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(1), X))["params"]
    draw = np.random.default_rng(2)
    return model, jax.tree.map(lambda leaf: jnp.float32(0.5 * draw.normal(size=leaf.shape)), shapes)


def unshared(model, params):
    """The same network with a copy of what is shared for every block."""

    def copies(leaf):
        return jnp.broadcast_to(leaf[None], (DEPTH, *leaf.shape))

    blocks = params["blocks"]
    copied = jax.tree.map(copies, {name: blocks[name] for name in ("mixer", "ffn")})
    return model.clone(shared=()), {**params, "blocks": {**blocks, **copied}}


def test_parameters_are_of_one_block_but_for_the_norms():
    model, params = made()
    deeper = model.clone(depth=5)
    shapes = jax.eval_shape(deeper.init, jax.random.key(0), X)["params"]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, shapes)]
    assert sizes[1] - sizes[0] == 3 * 4 * 16
    assert params["blocks"]["ffn_norm"]["scale"].shape == (DEPTH, 16)
    assert params["blocks"]["ffn"]["expand_kernel"].shape == (4, 16, 64)


@pytest.mark.parametrize(
    ("variant", "parameters"), [("b16", 22_802_152), ("l16", 39_888_872), ("h14", 61_544_680)]
)
def test_published_shapes(variant, parameters):
    """4 d^2 of attention and 8 E d^2 of experts, whatever the depth."""
    model = resolve(get_config(variant)).model
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_one_expert_is_a_shared_block():
    model, params = made(experts=1, chosen=1, capacity=None, eval_capacity=None)
    plain, copied = unshared(model, params)
    plain = plain.clone(block=plain.block.clone(ffn=MLP(64)))
    ffn = copied["blocks"]["ffn"]
    dense = {
        "expand": {"kernel": ffn["expand_kernel"][:, 0], "bias": ffn["expand_bias"][:, 0]},
        "contract": {"kernel": ffn["contract_kernel"][:, 0], "bias": jnp.zeros((DEPTH, 16))},
    }
    wanted = jax.jit(plain.apply)({"params": {**copied, "blocks": {**copied["blocks"], "ffn": dense}}}, X)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, X), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_add_up_over_depth():
    model, params = made()
    plain, copied = unshared(model, params)

    @functools.partial(jax.jit, static_argnums=0)
    def slope(model, params):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, X))))(params)

    (loss, ours), (same, apart) = slope(model, params), slope(plain, copied)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    summed = {name: jax.tree.map(lambda g: g.sum(0), apart["blocks"][name]) for name in ("mixer", "ffn")}
    wanted = {**apart, "blocks": {**apart["blocks"], **summed}}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, wanted)
    assert jnp.any(ours["blocks"]["ffn"]["router"]["kernel"])


def routes(model, params, layer, x):
    """Which experts the tokens of `x` go to in one block."""
    blocks = params["blocks"]
    norms = {
        name: jax.tree.map(lambda leaf: leaf[layer], blocks[name]) for name in ("mixer_norm", "ffn_norm")
    }
    own = {"params": {**norms, "mixer": blocks["mixer"], "ffn": blocks["ffn"]}}
    apply = functools.partial(model.block.apply, mutable=["intermediates"])
    _, sown = jax.jit(lambda own, x: apply(own, x, jnp.zeros(()), Context()))(own, x)
    (found,) = sown["intermediates"]["ffn"]["routes"]
    return np.asarray(found.token), np.asarray(found.sizes)


def test_only_norms_make_blocks_route_differently():
    model, params = made()
    x = jax.random.normal(jax.random.key(3), (3, 16, 16))
    first, second = (routes(model, params, layer, x) for layer in range(DEPTH))
    assert not np.array_equal(first[0], second[0])
    alike = {
        name: jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * DEPTH), params["blocks"][name])
        for name in ("mixer_norm", "ffn_norm")
    }
    params = {**params, "blocks": {**params["blocks"], **alike}}
    again, same = (routes(model, params, layer, x) for layer in range(DEPTH))
    for a, b, c in zip(first, again, same, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_balance_is_its_weight_in_every_block_where_routing_is_even():
    model, params = made(noise=0.0)
    ffn = {**params["blocks"]["ffn"], "router": {"kernel": jnp.zeros((16, 4))}}
    params = {**params, "blocks": {**params["blocks"], "ffn": ffn}}
    batch = {"image": X, "target": jnp.full((3, 10), 0.1)}
    means, _ = jax.jit(Classification(model).loss)({"params": params}, batch, jax.random.key(0))
    assert float(means["load_balance"].value()) == pytest.approx(DEPTH * 0.01, rel=1e-5)
