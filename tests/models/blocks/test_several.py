"""Cycles and pairs of denoising blocks: what they compute, their parameters, step caches around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.layers.stack import streams
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.hyena import Hyena
from effjax.models.blocks.adaln import DiTBlock, Layer
from effjax.models.blocks.several import Cycle, Parallel
from effjax.models.dit import DiT
from effjax.tokens.tome import ToMe


def block(mixer=None):
    return DiTBlock(mixer=mixer or Attention(heads=2), ffn=MLP(hidden=12))


def dit(block, **changes):
    return DiT(**(dict(block=block, patch=2, dim=8, depth=4, classes=3, frequencies=6) | changes))


def inputs(batch=2):
    x = np.random.default_rng(5).normal(size=(batch, 8, 8, 1))
    return jnp.float32(x), jnp.linspace(1.0, 900.0, batch), jnp.arange(batch) % 4


def randomised(model, *args):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def run(model, params, *args, **options):
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a, **options))(params, *args)


def in_cycles(params, length):
    """The parameters of a plain DiT as those of one with cycles."""

    def cut(i):
        return jax.tree.map(lambda leaf: leaf[i::length], params["blocks"])

    return {**params, "blocks": {f"members_{i}": cut(i) for i in range(length)}}


def test_a_cycle_of_equal_blocks_is_the_plain_network():
    plain, cycled = dit(block()), dit(Cycle((block(), block())), depth=2)
    params = randomised(plain, *inputs())
    wanted = run(plain, params, *inputs())
    assert jax.tree.map(jnp.shape, in_cycles(params, 2)) == jax.tree.map(
        jnp.shape, randomised(cycled, *inputs())
    )
    np.testing.assert_allclose(run(cycled, in_cycles(params, 2), *inputs()), wanted, rtol=1e-5, atol=1e-5)
    merged = plain.clone(reduce=ToMe(0.5, metric="features"))
    np.testing.assert_allclose(
        run(cycled.clone(reduce=merged.reduce), in_cycles(params, 2), *inputs()),
        run(merged, params, *inputs()),
        rtol=1e-5,
        atol=1e-5,
    )


def test_blocks_side_by_side_are_added_up_at_first():
    x, c = jnp.float32(np.random.default_rng(1).normal(size=(2, 2, 5, 8)))
    c = c[:, 0]
    pair = Parallel((block(), block(Hyena())))
    params = randomised(pair, x, Layer(), c, Context())
    fresh = meta.unbox(jax.jit(pair.init)(jax.random.key(0), x, Layer(), c, Context()))["params"]["merge"]
    eye = np.eye(8)
    np.testing.assert_array_equal(fresh["kernel"], np.concatenate([eye, eye]))
    got, _ = run(pair, {**params, "merge": fresh}, x, Layer(), c, Context())
    first, _ = run(pair.members[0], params["members_0"], x, Layer(), c, Context())
    second, _ = run(pair.members[1], params["members_1"], x, Layer(), c, Context())
    np.testing.assert_allclose(got, first + second - x, rtol=1e-5, atol=1e-5)
    merge = params["merge"]
    got, _ = run(pair, params, x, Layer(), c, Context())
    wanted = x + jnp.concatenate([first - x, second - x], -1) @ merge["kernel"] + merge["bias"][None, None]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Cycle, Parallel])
def test_step_caches_see_the_branches_of_all_members(kind):
    model = dit(kind((block(), block(Hyena()))), depth=2)
    assert model.branches == 4
    params = randomised(model, *inputs())
    stream = run(model, params, *inputs(), method="begin")
    kept = jnp.zeros((2, 4, 2, 16, 8))
    fresh = jnp.ones((2, 4), bool)
    whole, kept = run(model, params, stream, fresh, kept, method="recall")
    np.testing.assert_allclose(whole.x, run(model, params, stream, method="layers").x, rtol=1e-5, atol=1e-6)
    again, _ = run(model, params, stream, ~fresh, kept, method="recall")
    np.testing.assert_allclose(again.x, whole.x, rtol=1e-5, atol=1e-6)
    none, _ = run(model, params, stream, fresh.at[0, 3].set(False), jnp.zeros_like(kept), method="recall")
    assert not np.allclose(none.x, whole.x)


def test_what_went_through_mixers_and_ffns_is_told_by_layer():
    model = dit(block(), depth=3)
    params = randomised(model, *inputs())
    _, told = run(model, params, *inputs(), mutable=["intermediates"])
    told = told["intermediates"]["blocks"]
    (operators,) = told["operators"]
    assert len(streams(told)) == 4
    for name, module in (("mixer", Attention(heads=2)), ("ffn", MLP(hidden=12))):
        h, y = operators[name]
        assert h.shape == y.shape == (3, 2, 16, 8)
        context = (Context(),) if name == "mixer" else ()
        own = jax.tree.map(lambda leaf: leaf[1], params["blocks"][name])
        np.testing.assert_allclose(run(module, own, h[1], *context), y[1], rtol=1e-5, atol=1e-5)


def test_a_config_names_the_members():
    layer = dict(kind="adaln_zero", mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"))
    section = dict(kind="dit", patch=2, dim=8, depth=1, classes=3, block=dict(kind="cycle", members=(layer,)))
    model = build_kind(models.KINDS, section, "config.model")
    assert isinstance(model.block.members[0], DiTBlock)
    with pytest.raises(UsageError, match="Parallel needs members"):
        Parallel(())
