import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from effjax.compress.steps.prune import Prune
from effjax.compress.structure.choose import Least, kept
from effjax.compress.structure.cost import macs, width_costs
from effjax.compress.structure.latency import measured
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.optin import Optin
from effjax.compress.structure.scores import EVERYWHERE, Magnitude, Random, Taylor
from effjax.compress.structure.stream import keep_channels, stream_axes, stream_sums
from effjax.compress.structure.units import keep, sizes
from effjax.errors import UsageError
from effjax.layers.norms import LayerNorm
from tests.compress import tiny
from tests.compress.structure.networks import subject
from tests.compress.structure.test_choose import SINGLE, calibration

PLACE = EVERYWHERE, "stream"


def output(network, variables=None):
    read = network.example["tokens" if "tokens" in network.example else "image"]
    return jax.jit(network.model.apply)(network.variables if variables is None else variables, read)


def multiplied(network, factors):
    """Every number of every channel times a factor."""
    flat = dict(flatten_dict(dict(network.variables), sep="/"))
    for path, axes in stream_axes(network).items():
        for axis in axes:
            shape = [1] * flat[path].ndim
            shape[axis] = -1
            flat[path] = flat[path] * jnp.asarray(factors).reshape(shape)
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("name", ["vit", "lm", "lm_pairs"])
def test_without_channels_is_with_zeros_that_norms_do_not_count(name):
    network = subject(name)
    width = network.model.dim
    left = np.delete(np.arange(width), [0, 3, width - 2])
    mask = np.isin(np.arange(width), left)

    def count_kept(call, arguments, options, context):
        module, x = context.module, arguments[0]
        if not isinstance(module, LayerNorm | nn.RMSNorm) or x.shape[-1] != width:
            return call(*arguments, **options)
        held = [module.get_variable("params", part, mask * 0.0)[left] for part in ("scale", "bias")]
        scale, bias = (part.reshape((1,) * (x.ndim - 1) + (-1,)) for part in held)
        x = x[..., left]
        if isinstance(module, LayerNorm):
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + module.epsilon) * scale + bias
        return jnp.zeros_like(arguments[0]).at[..., left].set(y)

    with nn.intercept_methods(count_kept):
        expected = output(network, multiplied(network, mask.astype(np.float32)))
    small = keep_channels(network, left)
    assert small.model.dim == len(left)
    assert [sizes(layer) for layer in take_apart(small)] == [sizes(layer) for layer in take_apart(network)]
    np.testing.assert_allclose(output(small), expected, rtol=2e-4, atol=2e-5)
    assert np.abs(output(network) - expected).max() > 1e-2


@pytest.mark.parametrize("name", ["vit", "lm"])
def test_costs_at_any_width_are_those_that_are_counted(name):
    network = subject(name)
    layers = take_apart(network)
    prices = width_costs(network, layers)
    channels = np.arange(network.model.dim - 3)
    small = keep_channels(network, channels)
    made = [keep(take_apart(small)[0], "hidden", range(5)), *take_apart(small)[1:]]
    has = [dataclasses.replace(sizes(layer), stream=len(channels)) for layer in made]
    told = sum(cost.of(each) for cost, each in zip(prices, has, strict=True))
    assert round(told) == macs(put_together(small, made))


@pytest.mark.parametrize("name", ["vit", "lm"])
def test_channels_that_nobody_reads_or_writes_go_first(name):
    network = subject(name)
    dead = [1, 4, 6]
    factors = np.ones(network.model.dim, np.float32)
    factors[dead] = 0
    network = dataclasses.replace(network, variables=multiplied(network, factors))
    layers = take_apart(network)
    prices = width_costs(network, layers)
    budget = float(macs(keep_channels(network, np.delete(np.arange(network.model.dim), dead))))
    for score in (Magnitude(), Taylor(1)):
        scores = score.score(network, layers, ("hidden", "stream"), calibration(network))
        stay = kept(layers, scores, prices, budget, dataclasses.replace(SINGLE, stream=1, stream_step=1))
        assert set(range(network.model.dim)) - set(stay[PLACE].tolist()) == set(dead)


def test_the_change_of_the_loss_is_by_all_numbers_of_a_channel():
    """(sum_w w g)^2 by hand, on one batch."""
    network = subject("vit")
    told = calibration(network)
    found = Taylor(1).score(network, take_apart(network), ("stream",), told)[PLACE]
    keys = jax.random.split(jax.random.fold_in(told.key, 0))
    batch = network.task.prepare({"mask": jnp.ones(2), **network.example}, keys[0])

    def loss(factors):
        means, _ = network.task.loss(multiplied(network, factors), batch, keys[1])
        return means["loss"].value()

    slope = jax.jit(jax.grad(loss))(jnp.ones(network.model.dim))
    np.testing.assert_allclose(found, slope**2, rtol=2e-3, atol=1e-9)
    less = Taylor(1, divided={"stream": 3.0}).score(network, take_apart(network), ("stream",), told)[PLACE]
    np.testing.assert_allclose(less, found / 9, rtol=1e-4)
    with pytest.raises(UsageError, match="divided="):
        Taylor(divided={"streams": 1.0})


def test_what_belongs_to_a_channel_twice_counts_once(draw):
    square = draw.normal(size=(3, 2, 3)).astype(np.float32)
    own = [square[i].sum() + square[:, :, i].sum() - square[i, :, i].sum() for i in range(3)]
    found = stream_sums({"a": jnp.asarray(square)}, {"params/a": (0, 2)})
    np.testing.assert_allclose(found, own, rtol=1e-5)


def test_what_is_worth_least_for_what_it_saves_now_goes_first():
    """All that could go looked at anew after every unit: hidden units that go make channels cheap to keep."""
    network = subject("vit")
    layers = take_apart(network)
    prices = width_costs(network, layers)
    scores = Random().score(network, layers, ("hidden", "stream"), calibration(network))
    budget = 0.5 * macs(network)
    stay = kept(layers, scores, prices, budget, dataclasses.replace(SINGLE, stream=1, stream_step=1))

    has = [dataclasses.replace(sizes(layer), stream=network.model.dim) for layer in layers]
    ranked = {place: np.sort(np.asarray(worth)) for place, worth in scores.items()}
    total = lambda has: sum(price.of(each) for price, each in zip(prices, has, strict=True))
    while total(has) > budget:
        ways = []
        for (at, kind), worth in ranked.items():
            left = getattr(has[at], kind)
            less = [
                dataclasses.replace(each, **{kind: left - 1}) if at in (i, EVERYWHERE) else each
                for i, each in enumerate(has)
            ]
            if left > 1:
                ways.append((worth[len(worth) - left] / (total(has) - total(less)), less))
        has = min(ways, key=lambda way: way[0])[1]
    assert {place: units.shape[-1] for place, units in stay.items()} == {
        (at, kind): getattr(has[at], kind) for at, kind in ranked
    }
    assert 1 < len(stay[PLACE]) < network.model.dim


def test_a_step_prunes_the_stream_and_a_whole_budget_is_the_identity():
    network = subject("vit")
    told = calibration(network)
    least = Least(hidden=sizes(take_apart(network)[0]).hidden - 1, hidden_step=1, stream=2, stream_step=2)
    step = Prune(left=0.5, score=Magnitude(), kinds=("hidden", "stream"), least=least, rounds=2)
    small = step.apply(network, told)
    assert macs(small) <= 0.5 * macs(network)
    assert small.model.dim < network.model.dim
    assert small.model.dim % 2 == 0
    assert output(small).shape == output(network).shape
    same = dataclasses.replace(step, left=1.0).apply(network, told)
    assert same.model == network.model
    jax.tree.map(np.testing.assert_array_equal, same.variables, network.variables)


def test_a_table_of_times_has_an_axis_of_widths():
    network = tiny.language()
    table = measured(network, take_apart(network), ("hidden", "stream"), network.example, repeats=1)
    assert table.points == ((1, 8, 16, 32), (1, 4, 8, 16))
    assert table.seconds.shape == (4, 4)
    assert (table.seconds > 0).all()


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda: keep_channels(subject("dit"), [0]), "positions computed from the width"),
        (lambda: keep_channels(subject("swin"), [0]), "Pyramid has a stream that cannot be narrowed"),
        (lambda: _pruned(subject("swin")), "Pyramid has a stream that cannot be narrowed"),
        (lambda: _pruned(subject("dit")), "DiT has a stream that cannot be narrowed"),
        (lambda: keep_channels(subject("vit"), []), "keeps at least one"),
        (lambda: keep_channels(subject("vit"), [-1]), "none such as"),
        (lambda: keep_channels(tiny.language(mixer=dict(kind="mamba")), [0]), "Mamba, whose width"),
        (lambda: _scored_by_optin(subject("vit")), "channel of the stream"),
    ],
)
def test_what_cannot_be_narrowed_is_said(cut, said):
    with pytest.raises(UsageError, match=said):
        cut()


def _scored_by_optin(network):
    return Optin().score(network, take_apart(network), ("stream",), calibration(network))


def _pruned(network):
    return Prune(kinds=("hidden", "stream")).apply(network, calibration(network))
