import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.blocks import Blocks, found_in
from effjax.compress.steps import fusegpt
from effjax.compress.steps.fusegpt import FuseGPT, group_of, influences
from effjax.compress.steps.round import Round
from effjax.compress.storage.uniform import Uniform
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from effjax.layers.stack import Stack
from effjax.layers.stored import Place
from effjax.measure.parameters import count_parameters
from tests.compress import tiny
from tests.compress.structure.networks import subject


@functools.cache
def deep(depth=4):
    """A language model of several layers with random weights, none of them zero."""
    made = subject("lm")
    draw = np.random.default_rng(depth)
    grown = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * (depth // 2)), made.params["blocks"])
    blocks = jax.tree.map(lambda leaf: leaf + 0.2 * jnp.float32(draw.normal(size=leaf.shape)), grown)
    return made.with_model(made.model.clone(depth=depth), {"params": {**made.params, "blocks": blocks}})


def calibration(network, told=None):
    report = (lambda said: None) if told is None else told.append
    return Calibration(lambda: iter([network.example] * 4), jax.random.key(3), report, network)


def leaving(network):
    """What leaves the last layer, by the network as it is run."""
    found = []

    def take(call, args, kwargs, context):
        made = call(*args, **kwargs)
        if isinstance(context.module, Stack) and context.method_name == "__call__":
            found.append(made[0])
        return made

    def run(variables):
        with nn.intercept_methods(take):
            network.task.metrics(variables, {**network.example, "mask": jnp.ones(2)})
        return found.pop()

    return np.asarray(jax.jit(run)(network.variables), np.float64)


def without(network, *gone):
    return put_together(network, [layer for layer in take_apart(network) if layer.number not in gone])


def measured(network, alive):
    ((blocks, entered),) = found_in(network, [network.example])
    own = {"params": network.params["blocks"]}
    return jax.jit(functools.partial(influences, blocks))(own, jnp.asarray(alive), entered)


def test_influence_is_that_of_the_network_without_the_layer():
    network = deep()
    got = measured(network, [True, False, True, True])
    whole = leaving(without(network, 1))
    for number in (0, 2, 3):
        rest = leaving(without(network, 1, number))
        sizes = np.linalg.norm(whole, axis=-1) * np.linalg.norm(rest, axis=-1)
        expected = 1 - np.mean(np.sum(whole * rest, -1) / sizes)
        np.testing.assert_allclose(got[number], expected, rtol=1e-4)
    assert np.isinf(got[1])


def test_a_layer_that_gives_nothing_has_no_influence_and_goes_first():
    network, told = deep(), []
    blocks = network.params["blocks"]
    quiet = {
        branch: {**blocks[branch], last: jax.tree.map(lambda leaf: leaf.at[2].set(0), blocks[branch][last])}
        for branch, last in (("mixer", "output"), ("ffn", "contract"))
    }
    silent = network.with_params({**network.params, "blocks": {**blocks, **quiet}})
    each = np.asarray(measured(silent, [True] * 4))
    assert each[2] == 0
    assert (each[[0, 1, 3]] > 0).all()
    made = FuseGPT(epochs=0).apply(silent, calibration(silent, told))
    assert told[0].startswith("layer 2 goes, influence 0 ")
    np.testing.assert_array_equal(leaving(made), leaving(silent))


def test_without_training_layers_are_left_out():
    network = deep()
    made = FuseGPT(left=0.5, epochs=0).apply(network, calibration(network))
    first = int(np.argmin(measured(network, [True] * 4)))
    second = int(np.argmin(measured(network, [number != first for number in range(4)])))
    expected = without(network, first, second)
    assert made.model == expected.model
    assert made.model.depth == 2
    assert not made.model.layer_blocks
    jax.tree.map(np.testing.assert_array_equal, made.params, expected.params)


def test_a_fusion_that_learns_nothing_leaves_the_layers_as_they_are():
    network = deep()
    made = FuseGPT(coefficient_lr=0.0, lr=0.0, batches=1, epochs=1).apply(network, calibration(network))
    expected = FuseGPT(epochs=0).apply(network, calibration(network))
    jax.tree.map(np.testing.assert_array_equal, made.params, expected.params)


def test_folded_matrices_give_what_the_parts_gave(draw):
    """x W + x ((A B) * W_p) + (x C) D, of heads that stand before their channels."""
    kernel, removed = jnp.float32(draw.normal(size=(2, 3, 4, 5)))
    place = Place((3, 4, 5), (None,) * 3, (4, 5), (3,), turned=True)
    a, c = jnp.float32(draw.normal(size=(2, 20, 2)))
    b, d = jnp.float32(draw.normal(size=(2, 2, 3)))
    made = jax.jit(functools.partial(fusegpt.fused, place=place))(kernel, removed, (a, b), (c, d))
    assert made.shape == kernel.shape
    x = np.float64(draw.normal(size=(7, 4, 5)))
    both = sum(
        np.einsum("nij,oij->no", x * np.float64(a)[:, r].reshape(4, 5)[None], np.float64(removed))
        * np.float64(b)[r][None]
        for r in range(2)
    )
    adapted = x.reshape(7, 20) @ np.float64(c) @ np.float64(d)
    expected = np.einsum("nij,oij->no", x, np.float64(kernel)) + both + adapted
    np.testing.assert_allclose(np.einsum("nij,oij->no", x, np.float64(made)), expected, rtol=1e-5, atol=1e-4)
    zeros = (a, 0 * b), (c, 0 * d)
    np.testing.assert_array_equal(fusegpt.fused(kernel, removed, *zeros, place), kernel)


class Linear(nn.Module):
    """A layer that is one matrix."""

    @nn.compact
    def __call__(self, x, each, train=False):
        return x @ self.param("kernel", nn.initializers.zeros, (x.shape[-1], x.shape[-1])), None


def test_a_planted_coefficient_is_found(draw):
    """The group gave x (W_j + c * W_p), with c of rank one."""
    blocks = Blocks("blocks", Stack(Linear(), 2), "__call__")
    place = Place((6, 6), (None, None), (6,), (6,), turned=False)
    kernels = jnp.float32(draw.normal(size=(2, 6, 6)))
    share = np.outer(draw.uniform(0.5, 1, 6), draw.uniform(0.5, 1, 6))
    x = jnp.float32(draw.normal(size=(4, 2, 20, 6)))
    goal = x @ (kernels[0] + jnp.float32(share) * kernels[1])
    entered = fusegpt.Entered(x, None, ())
    step = FuseGPT(rank=2, adapter_rank=2, epochs=400, coefficient_lr=0.02, lr=0.0)
    teach = jax.jit(functools.partial(step.taught, blocks, {"kernel": place}))
    given = {"params": {"kernel": kernels}}, jnp.asarray([0]), jnp.asarray(1), entered, goal
    made, first, last = teach(*given, jax.random.key(0))
    assert last < 1e-5 * first
    found = (made["params"]["kernel"][0] - kernels[0]) / kernels[1]
    np.testing.assert_allclose(found, share, atol=0.02)
    np.testing.assert_array_equal(made["params"]["kernel"][1], kernels[1])


@pytest.mark.parametrize("name", ["lm", "vit", "dit"])
def test_training_brings_the_group_nearer_and_leaves_an_ordinary_network(name):
    network, told = deep() if name == "lm" else subject(name), []
    step = FuseGPT(0.5, rank=4, adapter_rank=4, batches=2, influence_batches=1, epochs=15, lr=1e-3)
    made = step.apply(network, calibration(network, told))
    depth = network.model.depth
    assert len(told) == depth - depth // 2
    for said in told:
        before, after = (
            float(said.split(name)[1].split(";")[0].split(",")[0]) for name in ("group", "trained")
        )
        assert after < 0.95 * before
    assert made.model.depth == depth // 2
    each = count_parameters(network.params["blocks"]) // depth
    assert count_parameters(made.params) == count_parameters(network.params) - each * (depth - depth // 2)
    assert np.isfinite(leaving(made)).all()


def test_a_layer_joins_its_group_only_where_it_is_near():
    """With adapters and coefficients of rank 0 norms alone are trained, and of the group alone."""
    network, told = deep(), []
    step = FuseGPT(neighbours=1, rank=0, adapter_rank=0, batches=1, epochs=2, lr=1e-2)
    made = step.apply(network, calibration(network, told))
    gone = int(told[0].split()[1])
    partner = gone - 1 if gone else 1
    rows = [row for row in range(4) if row != gone]
    old, new = network.params["blocks"], made.params["blocks"]
    for place, row in enumerate(rows):
        same = np.array_equal(new["ffn_norm"]["scale"][place], old["ffn_norm"]["scale"][row])
        assert same == (row != partner)
        np.testing.assert_array_equal(
            new["mixer"]["key"]["kernel"][place], old["mixer"]["key"]["kernel"][row]
        )


@pytest.mark.parametrize(
    ("gone", "expected"),
    [(0, range(8)), (1, range(8)), (4, range(8)), (5, range(1, 9)), (9, range(5, 13)), (12, range(6, 14)),
     (13, range(6, 14))],
)  # fmt: skip
def test_groups_of_eight_are_the_published_ones(gone, expected):
    np.testing.assert_array_equal(group_of(np.ones(14, bool), gone, 7), list(expected))


def test_a_group_passes_over_layers_that_are_gone():
    alive = np.array([True, False, True, True, False, True])
    np.testing.assert_array_equal(group_of(alive, 3, 2), [2, 3, 5])
    np.testing.assert_array_equal(group_of(alive, 3, 9), [0, 2, 3, 5])


def test_the_whole_share_is_the_network_itself():
    network = deep()
    assert FuseGPT(left=1.0).apply(network, calibration(network)) is network


def test_wrong_requests():
    network = deep()
    with pytest.raises(UsageError, match="leaves none"):
        FuseGPT(left=0.2).apply(network, calibration(network))
    with pytest.raises(UsageError, match="share above 0"):
        FuseGPT(left=0.0)
    with pytest.raises(UsageError, match="at least 1"):
        FuseGPT(neighbours=0)
    coded = Round(Uniform(4, 8), kernels=("blocks/ffn/.*",)).apply(network, calibration(network))
    with pytest.raises(UsageError, match="before they are stored"):
        FuseGPT().apply(coded, calibration(network))
    layers = take_apart(network)
    other = layers[0].block.clone(epsilon=1e-3, parent=None, name=None)
    differ = put_together(network, [dataclasses.replace(layers[0], block=other), *layers[1:]])
    with pytest.raises(UsageError, match="layers that differ"):
        FuseGPT().apply(differ, calibration(network))
    swin = subject("swin")
    with pytest.raises(UsageError, match="layers that differ"):
        FuseGPT().apply(swin, calibration(swin))
    placed = tiny.language()
    model = dataclasses.replace(placed.task, model=placed.model.clone(norm_scaling=True))
    with pytest.raises(UsageError, match="know their place"):
        FuseGPT(left=0.5).apply(dataclasses.replace(placed, task=model), calibration(placed))
