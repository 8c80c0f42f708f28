import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.structure.choose import Least, kept, narrowed
from effjax.compress.structure.cost import costs, macs
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.scores import Magnitude, Random, Taylor
from effjax.compress.structure.units import Sizes, keep, silence, sizes
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from tests.compress.structure.networks import subject

SINGLE = Least(1, 1, 1, 1, 1, 1, 1, 1)
ALL = ("heads", "qk", "value", "hidden")


def calibration(network):
    return Calibration(lambda: iter([network.example] * 3), jax.random.key(0), report=lambda told: None)


@pytest.mark.parametrize("name", ["vit", "lm"])
def test_costs_are_those_that_are_counted(name):
    network = subject(name)
    layers = take_apart(network)
    prices = costs(network, layers)
    first = keep(keep(layers[0], "heads", [1]), "hidden", range(5))
    second = layers[1]
    for kind, count in (("qk", 2), ("value", 3)):
        rows = np.tile(np.arange(count), (sizes(second).heads, 1))
        second = keep(second, kind, rows[0] if kind == "qk" and name == "lm" else rows)
    made = [first, second, *layers[2:]]
    told = sum(cost.of(sizes(layer)) for cost, layer in zip(prices, made, strict=True))
    assert round(told) == macs(put_together(network, made))


def test_a_whole_budget_is_the_identity_and_a_small_one_is_met_by_the_fewest():
    network = subject("vit")
    layers = take_apart(network)
    prices, told = costs(network, layers), calibration(network)
    scores = Magnitude().score(network, layers, ALL, told)
    whole = macs(network)
    same = put_together(network, narrowed(layers, kept(layers, scores, prices, float(whole), SINGLE)))
    assert same.model == network.model
    jax.tree.map(np.testing.assert_array_equal, same.variables, network.variables)

    budget = 0.6 * whole
    stay = kept(layers, scores, prices, budget, SINGLE)
    small = macs(put_together(network, narrowed(layers, stay)))
    dearest = max(
        price.of_unit(kind, sizes(layer)) for price, layer in zip(prices, layers, strict=True) for kind in ALL
    )
    assert budget - dearest < small <= budget


def test_steps_leave_multiples():
    network = subject("vit")
    layers = take_apart(network)
    scores = Random().score(network, layers, ("hidden",), calibration(network))
    stay = kept(layers, scores, costs(network, layers), 0.7 * macs(network), Least(hidden_step=8))
    assert any(units.shape[-1] < sizes(layers[at]).hidden for (at, _), units in stay.items())
    assert all(units.shape[-1] % 8 == 0 for units in stay.values())


@pytest.mark.parametrize("name", ["vit", "dit", "lm", "swin"])
def test_units_that_give_nothing_go_first(name):
    network = subject(name)
    layers = list(take_apart(network))
    count = sizes(layers[1]).hidden
    dead = np.arange(0, count, 2)
    factors = np.ones(count)
    factors[dead] = 0
    quiet = silence(layers[1], "hidden", factors)
    for part in ("expand", "gate"):  # and they do not read anything either
        if part in quiet["ffn"]:
            quiet["ffn"][part] = jax.tree.map(lambda p: p * _row(factors, p), quiet["ffn"][part])
    layers[1] = _with(layers[1], quiet)
    network = put_together(network, layers)
    layers = take_apart(network)
    prices = costs(network, layers)
    budget = macs(network) - len(dead) * prices[1].hidden
    for score in (Magnitude(), Taylor(2)):
        scores = score.score(network, layers, ("hidden",), calibration(network))
        stay = kept(layers, scores, prices, budget, SINGLE)
        assert set(range(count)) - set(stay[1, "hidden"].tolist()) == set(dead.tolist())
        assert all(len(units) == sizes(layers[at]).hidden for (at, _), units in stay.items() if at != 1)


def test_the_first_order_change_is_the_change_of_a_quadratic_loss_at_its_linear_part(draw):
    """(sum_w w g)^2 by hand, on one batch."""
    network = subject("vit")
    layers = take_apart(network)
    told = calibration(network)
    found = Taylor(1).score(network, layers, ("hidden",), told)[0, "hidden"]
    keys = jax.random.split(jax.random.fold_in(told.key, 0))
    batch = network.task.prepare({"mask": jnp.ones(2), **network.example}, keys[0])

    def loss(factors):
        own = _with(layers[0], _both(layers[0], factors))
        changed = put_together(network, [own, *layers[1:]])
        means, _ = network.task.loss(changed.variables, batch, keys[1])
        return means["loss"].value()

    slope = jax.jit(jax.grad(loss))(jnp.ones(sizes(layers[0]).hidden))
    np.testing.assert_allclose(found, slope**2, rtol=2e-3, atol=1e-10)


def test_what_cannot_be_met_is_said():
    network = subject("vit")
    layers = take_apart(network)
    scores = Magnitude().score(network, layers, ("heads",), calibration(network))
    with pytest.raises(UsageError, match="cannot be met"):
        kept(layers, scores, costs(network, layers), 0.1 * macs(network), Least())
    assert Sizes(1, 2, 3, 4) == Sizes(heads=1, qk=2, value=3, hidden=4)


def _with(layer, params):
    return dataclasses.replace(layer, variables={**layer.variables, "params": params})


def _both(layer, factors):
    """Every number of a hidden unit, times a factor."""
    params = dict(layer.params)
    expand, contract = params["ffn"]["expand"], params["ffn"]["contract"]
    params["ffn"] = {
        "expand": jax.tree.map(lambda p: p * _row(factors, p), expand),
        "contract": {**contract, "kernel": contract["kernel"] * factors[:, None]},
    }
    return params


def _row(factors, like):
    return jnp.asarray(factors).reshape((1,) * (like.ndim - 1) + (-1,))
