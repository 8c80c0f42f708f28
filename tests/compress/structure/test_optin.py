import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.blocks import evaluated
from effjax.compress.recovery import apart, evaluated_output
from effjax.compress.steps.prune import Prune
from effjax.compress.structure.choose import Least
from effjax.compress.structure.cost import macs
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.masks import but_one, mask_shape, masked
from effjax.compress.structure.optin import Optin, relations
from effjax.compress.structure.units import keep, silence, sizes, sums
from effjax.compress.subject import Calibration
from effjax.compress.trajectory import asked
from effjax.errors import UsageError
from tests.compress.structure.networks import subject

NETWORKS = ("vit", "dit", "lm", "swin")


def calibration(network):
    return Calibration(lambda: iter([network.example] * 2), jax.random.key(0), report=lambda told: None)


def scored(network, kinds=("heads", "hidden"), **fields):
    return Optin(**fields).score(network, take_apart(network), kinds, calibration(network))


def dead(network, at, kind, unit):
    """The network in which a unit's outgoing weights are zero."""
    layers = list(take_apart(network))
    factors = np.ones(mask_shape(layers[at], kind), np.float32)
    factors[unit] = 0
    quiet = silence(layers[at], kind, factors)
    layers[at] = dataclasses.replace(layers[at], variables={**layers[at].variables, "params": quiet})
    return put_together(network, layers)


def output(network):
    batch = evaluated(network.example)
    return jax.jit(lambda variables: evaluated_output(network, variables, batch))(network.variables)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_unit_that_gives_nothing_is_worth_nothing_and_every_other_something(name):
    network = dead(dead(subject(name), 0, "hidden", 3), 1, "heads", 0)
    scores = scored(network, together=8)
    assert float(scores[0, "hidden"][3]) == 0.0
    assert float(scores[1, "heads"][0]) == 0.0
    left = np.concatenate([np.asarray(worth).ravel() for worth in scores.values()])
    # Of a diffusion transformer some hidden units are off in both examples.
    assert left.size * 0.9 < (left > 0).sum() <= left.size - 2
    for (at, kind), worth in scores.items():
        layer = take_apart(network)[at]
        assert worth.shape == sums(layer, layer.params, kind).shape


@pytest.mark.parametrize("name", ["vit", "dit"])
def test_units_together_are_the_same_as_one_by_one_by_hand(name):
    """Each unit really taken out, and the differences summed in float64."""
    network = subject(name)
    layers = take_apart(network)
    shapes = {(at, "hidden"): mask_shape(layer, "hidden") for at, layer in enumerate(layers)}
    told = calibration(network)
    found = Optin(together=7, rows=10).errors(network, shapes, told)
    key = jax.random.fold_in(told.key, 0)
    batch = evaluated(network.example)

    def seen(other):
        told, (_, *streams) = asked(network, network.variables, batch)(other)
        return told, [np.asarray(relations(x, 10, key), np.float64) for x in streams]

    whole, goals = seen(network)
    for at, unit in ((0, 2), (1, 5), (len(layers) - 1, 0)):
        count = sizes(layers[at]).hidden
        cut = keep(layers[at], "hidden", [i for i in range(count) if i != unit])
        small = put_together(network, [*layers[:at], cut, *layers[at + 1 :]])
        y, features = seen(small)
        place = sum(math.prod(shape) for (layer, _), shape in shapes.items() if layer < at) + unit
        far = sum(np.mean((a - b) ** 2) for a, b in zip(goals, features, strict=True))
        np.testing.assert_allclose(found[0][place], far, rtol=2e-3, atol=1e-11)
        np.testing.assert_allclose(found[1][place], apart(network, y, whole, 1.0, None), rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize(("name", "kind"), [("vit", "heads"), ("vit", "value"), ("lm", "hidden")])
def test_many_masks_at_once_are_the_loop_and_the_narrowed_network(name, kind):
    network = subject(name)
    layers = take_apart(network)
    shapes = {(1, kind): mask_shape(layers[1], kind)}
    batch = evaluated(network.example)

    def run(number):
        quiet = masked(network, network.variables, but_one(shapes, number))
        return evaluated_output(quiet, quiet.variables, batch)

    numbers = jnp.arange(-1, 2)
    together = jax.jit(jax.vmap(run))(numbers)
    one = jax.jit(run)
    for number, found in zip(numbers, together, strict=True):
        np.testing.assert_allclose(found, one(number), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[0], output(network), rtol=1e-5, atol=1e-5)
    assert np.abs(together[1] - together[0]).max() > 1e-3
    if kind != "value":
        count = shapes[1, kind][0]
        cut = keep(layers[1], kind, [i for i in range(count) if i != 1])
        small = put_together(network, [layers[0], cut, *layers[2:]])
        np.testing.assert_allclose(together[2], output(small), rtol=1e-5, atol=1e-5)


def test_relations_know_nothing_of_a_rotation_or_a_length_of_the_channels(draw):
    x = draw.normal(size=(2, 5, 8)).astype(np.float32)
    turn, _ = np.linalg.qr(draw.normal(size=(8, 8)))
    key = jax.random.key(1)
    found = relations(jnp.asarray(x), 6, key)
    assert found.shape == (6, 6)
    np.testing.assert_allclose(np.diag(found), 1, rtol=1e-6)
    turned = relations(jnp.asarray(3 * x @ turn, jnp.float32), 6, key)
    np.testing.assert_allclose(found, turned, atol=1e-5)
    other = relations(jnp.asarray(x * np.arange(1, 9), jnp.float32), 6, key)
    assert np.abs(found - other).max() > 0.05, "and of anything else they do"
    flat = x.reshape(10, 8).astype(np.float64)
    cosine = flat @ flat.T / np.outer(*[np.sqrt((flat**2).sum(1))] * 2)
    np.testing.assert_allclose(relations(jnp.asarray(x), 99, key), cosine, atol=1e-6)


def test_the_output_counts_as_much_as_is_said():
    network = subject("vit")
    features, both = (scored(network, output=weight) for weight in (0.0, 1.0))
    flat = lambda scores: np.concatenate([np.asarray(worth).ravel() for worth in scores.values()])
    np.testing.assert_allclose(flat(features).mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(flat(both).mean(), 2, rtol=1e-5)
    half = flat(scored(network, output=0.5))
    np.testing.assert_allclose(half, (flat(features) + flat(both)) / 2, rtol=1e-4)


def test_prune_by_it_meets_its_budget_of_layers_that_differ_too():
    network = subject("vit")
    step = Prune(left=0.6, score=Optin(), rounds=2, least=Least(1, 1, 1, 1, 1, 1, 1, 1))
    small = step.apply(network, calibration(network))
    assert 0.5 < macs(small) / macs(network) <= 0.6


def test_what_it_cannot_score_is_said():
    with pytest.raises(UsageError, match="unit of qk"):
        scored(subject("vit"), ("qk",))
    with pytest.raises(UsageError, match="rows=0"):
        Optin(rows=0)
