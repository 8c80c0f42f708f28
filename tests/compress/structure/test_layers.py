import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.units import keep, without
from effjax.errors import UsageError
from effjax.models.lm import Layer as Kind
from tests.compress import tiny
from tests.compress.structure.networks import subject

NETWORKS = ("vit", "dit", "lm", "swin")


def outputs(network):
    """What a network says of its example."""
    batch = {"mask": jnp.ones(2), **network.example}
    return jax.jit(network.task.metrics)(network.variables, batch)["loss"].value()


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", NETWORKS)
def test_taken_apart_and_put_together_it_is_the_same(name):
    network = subject(name)
    layers = take_apart(network)
    again = put_together(network, layers)
    assert again.model == network.model
    same(again.variables, network.variables)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_that_differ_make_a_network_that_its_own_definition_builds(name):
    network = subject(name)
    first, *rest = take_apart(network)
    mixed = put_together(network, [keep(keep(first, "hidden", range(5)), "heads", [1]), *rest])
    made = jax.eval_shape(lambda: meta.unbox(mixed.task.init(jax.random.key(0), mixed.example)))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, dict(mixed.variables))
    assert np.isfinite(outputs(mixed))
    again = put_together(mixed, take_apart(mixed))
    assert again.model == mixed.model
    same(again.variables, mixed.variables)
    # Narrowed alike they are a scan again, where there is one stack.
    alike = put_together(mixed, [keep(layer, "hidden", range(4)) for layer in take_apart(mixed)[1:]])
    if name != "swin":
        assert alike.model.layer_blocks == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_branch_that_gives_nothing_can_be_left_out(name):
    network = subject(name)
    layers = list(take_apart(network))
    for branch, last in (("mixer", "output"), ("ffn", "contract")):
        quiet = dict(layers[1].params)
        silent = jax.tree.map(jnp.zeros_like, quiet[branch][last])
        quiet[branch] = {**quiet[branch], last: silent}
        before = put_together(network, [layers[0], _with(layers[1], quiet), *layers[2:]])
        after = put_together(network, [layers[0], without(layers[1], branch), *layers[2:]])
        np.testing.assert_allclose(outputs(before), outputs(after), rtol=1e-5)
    none = without(without(layers[1], "mixer"), "ffn")
    assert not jax.tree.leaves(none.params)
    with pytest.raises(UsageError, match="no mixer"):
        without(none, "mixer")


def test_a_layer_that_is_left_out_leaves_the_others_in_order():
    network = tiny.language()
    model = network.model.clone(layers=(Kind(rotary_base=1e3), Kind(rotary_base=1e5)))
    network = network.with_model(model, network.variables)
    second = put_together(network, take_apart(network)[1:])
    assert second.model.depth == 1
    assert second.model.layers == (Kind(rotary_base=1e5),)
    same(
        second.params["blocks"],
        jax.tree.map(lambda leaf: leaf[1:], network.params["blocks"]),
    )


def test_what_cannot_be_taken_apart_is_named():
    network = tiny.language()
    shared = network.with_model(network.model.clone(shared=("ffn/.*",)), network.variables)
    with pytest.raises(UsageError, match="share parameters"):
        take_apart(shared)
    with pytest.raises(UsageError, match="no layer is left"):
        put_together(network, [])
    scaled = network.with_model(network.model.clone(norm_scaling=True), network.variables)
    with pytest.raises(UsageError, match="know their place"):
        put_together(scaled, take_apart(scaled)[1:])
    pyramid = subject("swin")
    with pytest.raises(UsageError, match="stage 1 has no layer left"):
        put_together(pyramid, take_apart(pyramid)[:3])


def _with(layer, params):
    return dataclasses.replace(layer, variables={**layer.variables, "params": params})
