import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.units import apart, keep, silence, sizes, sums
from effjax.errors import UsageError
from tests.compress import tiny
from tests.compress.structure.networks import subject
from tests.compress.structure.test_layers import outputs

NETWORKS = ("vit", "dit", "lm", "swin")


def changed(network, number, layer):
    layers = list(take_apart(network))
    layers[number] = layer
    return put_together(network, layers)


def chosen(layer, kind, draw):
    """Half of the units: of every head others where it may."""
    count = getattr(sizes(layer), kind)
    rows = sizes(layer).heads if apart(layer, kind) else 1
    found = np.stack([np.sort(draw.permutation(count)[: count // 2]) for _ in range(rows)])
    return found if apart(layer, kind) else found[0]


def factors(layer, kind, kept):
    """1 for units that stay, 0 for others."""
    made = np.zeros((*kept.shape[:-1], getattr(sizes(layer), kind)), np.float32)
    np.put_along_axis(made, kept, 1.0, axis=-1)
    return made


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["heads", "value", "hidden"])
def test_a_network_without_units_is_the_one_in_which_they_give_nothing(name, kind, draw):
    network = subject(name)
    layer = take_apart(network)[1]
    if name == "swin" and kind == "value":
        assert not sizes(layer).value
        return
    kept = chosen(layer, kind, draw)
    quiet = silence(layer, kind, factors(layer, kind, kept))
    silent = changed(network, 1, dataclasses.replace(layer, variables={**layer.variables, "params": quiet}))
    small = changed(network, 1, keep(layer, kind, kept))
    count = lambda net: sum(leaf.size for leaf in jax.tree.leaves(net.params))
    assert count(small) < count(network)
    assert abs(outputs(network) - outputs(silent)) > 1e-4, "they took part"
    np.testing.assert_allclose(outputs(small), outputs(silent), rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dit", "lm", "lm_pairs"])
def test_queries_and_keys_without_channels_give_what_zeros_there_give(name, draw):
    network = subject(name)
    layer = take_apart(network)[1]
    kept = chosen(layer, "qk", draw)
    assert kept.ndim == (1 if name.startswith("lm") else 2)
    # What the units' sums read of numbers that are their own places is where their weights stand.
    gone = 1 - factors(layer, "qk", kept)
    flat = flatten_dict(layer.params, sep="/")
    zeroed = dict(flat)
    for path in flat:
        if path.startswith(("mixer/query", "mixer/key")):
            zeroed[path] = flat[path] * (1 - _spread(layer, path, gone))
    params = unflatten_dict(zeroed, sep="/")
    silent = changed(network, 1, dataclasses.replace(layer, variables={**layer.variables, "params": params}))
    small = changed(network, 1, keep(layer, "qk", kept))
    assert abs(outputs(network) - outputs(silent)) > 1e-4
    np.testing.assert_allclose(outputs(small), outputs(silent), rtol=1e-5)
    left = take_apart(small)[1]
    one = [0] if kept.ndim == 1 else np.zeros((len(kept), 1), np.int32)
    assert sizes(keep(left, "qk", one)).qk == 1, "what is left can be cut again"
    assert sizes(left).value == sizes(layer).value


def _spread(layer, path, gone):
    """1 where a parameter of queries or keys belongs to a unit that goes."""
    axes, leaf = layer.axes[path], flatten_dict(layer.params, sep="/")[path]
    mixer, channel = layer.block.mixer, leaf.shape[-1]
    if gone.ndim == 1:  # pairs
        channels = np.tile(gone, 2) if mixer.rotary_pairs == "halves" else np.repeat(gone, 2)
        return np.broadcast_to(channels, leaf.shape)
    heads = leaf.shape[next(i for i, name in enumerate(axes) if name in ("heads", "kv_heads"))]
    rows = np.repeat(gone, heads // gone.shape[0], axis=0)
    assert channel == gone.shape[1]
    return np.broadcast_to(rows, leaf.shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_number_of_a_kind_is_counted_once(name):
    layer = take_apart(subject(name))[0]
    ones = jax.tree.map(jnp.ones_like, layer.params)
    flat = flatten_dict(layer.params, sep="/")
    of = {
        "hidden": [p for p in flat if p.startswith("ffn/") and p != "ffn/contract/bias"],
        "heads": [p for p in flat if p.startswith("mixer/") and p != "mixer/output/bias"],
        "qk": [p for p in flat if p.startswith(("mixer/query", "mixer/key"))],
        "value": [p for p in flat if p.startswith(("mixer/value", "mixer/output/kernel"))],
    }
    for kind, paths in of.items():
        if getattr(sizes(layer), kind):
            found = sums(layer, ones, kind)
            assert found.shape[-1] == getattr(sizes(layer), kind)
            np.testing.assert_allclose(found, found.ravel()[0])
            assert float(found.sum()) == sum(flat[path].size for path in paths)


def test_what_cannot_go_is_named():
    layer = take_apart(tiny.language())[0]
    with pytest.raises(UsageError, match="no hidden left"):
        keep(layer, "hidden", [])
    with pytest.raises(UsageError, match="32 hidden"):
        keep(layer, "hidden", [32])
    with pytest.raises(UsageError, match="gives nothing by itself"):
        silence(layer, "qk", np.ones(4))
    normed = take_apart(tiny.language(mixer=dict(kind="attention", heads=2, causal=True, qk_norm=True)))[0]
    assert sizes(normed).qk == 0
    assert sizes(normed).heads == 2
    with pytest.raises(UsageError, match="no qk that it could lose"):
        keep(normed, "qk", [0])
