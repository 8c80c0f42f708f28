import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.recovery import evaluated_output
from effjax.compress.steps.slice import Slice
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.nested import Inner, Nested, NestedTask, inner
from effjax.compress.structure.units import silence, sizes
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from tests.compress.structure.networks import subject
from tests.train.toy import program_of

KEY = jax.random.key(5)
HALF = Inner(heads=0.5, hidden=0.5)


def output(network):
    return jax.jit(lambda v: evaluated_output(network, v, network.example))(network.variables)


def slopes(task, network, batch):
    run = lambda params: task.loss({"params": params}, batch, KEY)[0]["loss"]
    return jax.jit(jax.grad(lambda params: run(params).value()))(network.params)


def prepared(network):
    return network.task.prepare(network.example, KEY)


def test_all_of_a_network_is_the_network():
    network = subject("vit")
    same = inner(network, Inner())
    assert same.model == network.model
    jax.tree.map(np.testing.assert_array_equal, same.params, network.params)


@pytest.mark.parametrize("name", ["vit", "dit", "lm", "swin"])
def test_a_slice_is_the_network_whose_other_units_give_nothing(name):
    network = subject(name)
    small = inner(network, HALF)
    layers = []
    for layer in take_apart(network):
        for kind in ("heads", "hidden"):
            count = getattr(sizes(layer), kind)
            mask = (jnp.arange(count) < round(count / 2)).astype(jnp.float32)
            quiet = silence(layer, kind, mask)
            layer = dataclasses.replace(layer, variables={**layer.variables, "params": quiet})
        layers.append(layer)
    np.testing.assert_allclose(output(small), output(put_together(network, layers)), rtol=2e-4, atol=2e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(small.params)) < sum(
        leaf.size for leaf in jax.tree.leaves(network.params)
    )
    sliced = Slice(heads=0.5, hidden=0.5).apply(network, Calibration(lambda: iter(()), KEY))
    assert sliced.model == small.model


def test_networks_lie_in_one_another():
    network = subject("lm")
    twice = inner(inner(network, Inner(hidden=0.75)), Inner(hidden=1 / 3))
    once = inner(network, Inner(hidden=0.25))
    jax.tree.map(np.testing.assert_array_equal, twice.params, once.params)
    short = inner(network, Inner(depth=0.5))
    assert short.model.depth == network.model.depth // 2


def test_the_gradient_is_that_of_the_network_alone_and_nothing_behind_it_has_any():
    network = subject("lm")
    batch = prepared(network)
    task = NestedTask(network.task, Nested((HALF,)))
    found = slopes(task, network, batch)
    small = inner(network, HALF)
    run = lambda params: small.task.loss({"params": params}, batch, jax.random.split(KEY)[1])[0]["loss"]
    alone = jax.jit(jax.grad(lambda params: run(params).value()))(small.params)
    taken = inner(network.with_params(found), HALF).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), taken, alone)
    hidden = found["blocks"]["ffn"]["contract"]["kernel"]
    assert not np.asarray(hidden)[:, hidden.shape[1] // 2 :].any()
    assert np.asarray(hidden)[:, : hidden.shape[1] // 2].any()


def test_drawn_networks_have_the_mean_of_their_gradients():
    network = subject("vit")
    batch = prepared(network)
    both = slopes(NestedTask(network.task, Nested((HALF, Inner()), draws=2)), network, batch)
    each = [slopes(NestedTask(network.task, Nested((size,))), network, batch) for size in (HALF, Inner())]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), both, mean)


def test_every_network_has_its_turn():
    network = subject("vit")
    batch = prepared(network)
    sizes_of = (Inner(hidden=0.25), Inner(hidden=0.5), Inner())
    task = NestedTask(network.task, Nested(sizes_of))
    loss = jax.jit(lambda key: task.loss(network.variables, batch, key)[0]["loss"].value())
    found = {round(float(loss(jax.random.key(i))), 4) for i in range(20)}
    assert len(found) == 3


def test_it_trains_through_the_program_and_the_slice_learns():
    program = program_of("configs.vision.sortednet")
    batch = jax.device_put(next(iter(program.data.train())), program.batch_sharding)
    state, losses = program.init(), []
    for _ in range(8):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("size", [dict(heads=0.0), dict(hidden=1.5), dict(depth=-1.0)])
def test_shares_are_checked(size):
    with pytest.raises(UsageError, match="is a share above 0"):
        Inner(**size)


def test_what_does_not_nest_is_refused():
    with pytest.raises(UsageError, match="draws=2"):
        Nested((Inner(),), draws=2)
    with pytest.raises(UsageError, match="stages of a pyramid"):
        inner(subject("swin"), Inner(depth=0.5))
    network = subject("vit")
    task = NestedTask(network.task, Nested((Inner(),)))
    with pytest.raises(UsageError, match="cannot share batch_stats"):
        task.loss({**network.variables, "batch_stats": {}}, network.example, KEY)
