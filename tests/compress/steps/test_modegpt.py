import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.swin import swin
from effjax.compress.steps.modegpt import MoDeGPT
from effjax.compress.structure.choose import Least
from effjax.compress.structure.cost import costs, macs
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.modules import (
    Moments,
    joined,
    leverage,
    product_scores,
    refitted,
    shares,
    stay,
)
from effjax.compress.structure.units import KINDS, keep, sizes
from effjax.compress.subject import Calibration
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.layers.stack import streams
from effjax.mixers.rotary import rotate
from effjax.models import KINDS as MODELS
from tests.compress import tiny
from tests.compress.structure.networks import noisy, subject
from tests.compress.structure.test_layers import outputs

SINGLE = Least(1, 1, 1, 1, 1, 1, 1, 1)
network_of = functools.cache(subject)


def narrowed(network, told=None, **fields):
    report = (lambda text: None) if told is None else told.append
    calibration = Calibration(lambda: iter([network.example] * 2), jax.random.key(0), report)
    return MoDeGPT(**dict(batches=2, least=SINGLE) | fields).apply(network, calibration)


def half_of(network, kind):
    """The share of MACs that is left where every layer has half of its units of a kind."""
    layers = take_apart(network)
    prices = costs(network, layers)
    gone = [
        price.of_unit(kind, sizes(layer)) * getattr(sizes(layer), kind) / 2
        for price, layer in zip(prices, layers, strict=True)
    ]
    return 1 - sum(gone) / macs(network)


def edited(network, change):
    """The network with the parameters of every layer changed."""
    layers = [
        dataclasses.replace(layer, variables={**layer.variables, "params": change(layer)})
        for layer in take_apart(network)
    ]
    return put_together(network, layers)


def correlated(draw, rows=200, units=16, rank=None):
    """Rows whose columns depend on each other, some of them almost wholly."""
    rank = rank or units
    spread = np.exp(-0.5 * np.arange(rank))
    return draw.normal(size=(rows, rank)) * spread @ draw.normal(size=(rank, units))


def error(x, kernel, rows, fitted):
    return np.linalg.norm(x @ kernel - x[:, rows] @ fitted)


# The decompositions.


def test_moments_go_through_a_layer(draw):
    x, kernel, bias = draw.normal(size=(50, 4)), draw.normal(size=(4, 3)), draw.normal(size=3)
    known = Moments(50.0, x.mean(0), x.T @ x / 50)
    for shift in (bias, None):
        y = x @ kernel + (0 if shift is None else shift)
        found = known.through(kernel, shift)
        np.testing.assert_allclose(found.mean, y.mean(0))
        np.testing.assert_allclose(found.square, y.T @ y / 50)
        np.testing.assert_allclose(found.correlation(True), np.cov(y.T, bias=True), atol=1e-12)


def test_leverage_is_that_of_its_definition(draw):
    x = correlated(draw, units=6)
    square = x.T @ x
    direct = np.diag(square @ np.linalg.inv(square + 0.3 * np.eye(6)))
    np.testing.assert_allclose(leverage(square, 0.3), direct)
    # In turn: scored from the start each time, by the definition.
    left = list(range(6))
    while len(left) > 3:
        own = square[np.ix_(left, left)]
        left.pop(int(np.argmin(np.diag(own @ np.linalg.inv(own + 0.3 * np.eye(len(left)))))))
    assert stay(square, 3, 0.3, in_turn=True).tolist() == left
    assert stay(square, 3, 0.3, in_turn=False).tolist() == sorted(np.argsort(-direct)[:3].tolist())


def test_columns_that_depend_on_others_cost_nothing(draw):
    """Error 0 at the rank and not below; of columns that are alike, one by one alone keeps one each."""
    base = draw.normal(size=(100, 5))
    kernel = draw.normal(size=(15, 4))
    sums = np.concatenate([base, base @ draw.normal(size=(5, 5)), base], axis=1)  # [N, 15] of rank 5
    for x in (sums, np.concatenate([base] * 3, axis=1)):
        rows = stay(x.T @ x, 5, 1e-3, in_turn=True)
        assert error(x, kernel, rows, refitted(x.T @ x, rows, kernel)) < 1e-9
        rows = rows[1:]
        assert error(x, kernel, rows, refitted(x.T @ x, rows, kernel)) > 1
    small = np.concatenate([base, 1e-3 * base, 1e-3 * base], axis=1)
    rows = stay(small.T @ small, 5, 1.0, in_turn=False)
    assert rows.tolist() == list(range(5))
    assert error(small, kernel, rows, refitted(small.T @ small, rows, kernel)) < 1e-9


@pytest.mark.parametrize("in_turn", [False, True])
def test_nystrom_beats_what_chance_keeps_and_the_fit_what_is_cut(in_turn, draw):
    """Columns near to copies of 5; no choice beats chance always, over 10 networks it does."""
    ratios = []
    for _ in range(10):
        base, which = draw.normal(size=(200, 5)), draw.integers(0, 5, 16)
        x = base[:, which] * np.exp(draw.normal(size=16)) + 0.05 * draw.normal(size=(200, 16))
        kernel, square = draw.normal(size=(16, 4)), x.T @ x
        for count in (4, 8, 12):
            rows = stay(square, count, 1.0, in_turn)
            fitted = refitted(square, rows, kernel)
            best = np.linalg.lstsq(x[:, rows], x @ kernel, rcond=None)[0]
            found = error(x, kernel, rows, fitted)
            assert found <= error(x, kernel, rows, best) * (1 + 1e-6)
            assert found < error(x, kernel, rows, kernel[rows])
            others = [draw.permutation(16)[:count] for _ in range(20)]
            chance = [error(x, kernel, own, refitted(square, own, kernel)) for own in others]
            ratios.append(found / np.median(chance))
    assert np.all(np.exp(np.mean(np.log(np.reshape(ratios, (10, 3))), axis=0)) < 0.8)


def test_factors_are_the_best_of_their_rank(draw):
    """Eckart and Young in the metric of C, by its root; and never worse than the plain SVD."""
    x = correlated(draw, units=10)
    value, output = draw.normal(size=(10, 6)), draw.normal(size=(6, 9))
    square = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(square)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    tail = np.linalg.svd(root @ value @ output, compute_uv=False)
    u, s, v = np.linalg.svd(value @ output)
    for rank in range(1, 7):
        first, second = joined(value.T @ square @ value, output, rank)
        assert (first.shape, second.shape) == ((6, rank), (rank, 9))
        lost = x @ value @ (output - first @ second)
        found = np.sqrt(np.square(lost).sum() / len(x))
        np.testing.assert_allclose(found, np.sqrt(np.square(tail[rank:6]).sum()), atol=1e-6)
        plain = x @ (value @ output - u[:, :rank] * s[:rank] @ v[:rank])
        assert found <= np.sqrt(np.square(plain).sum() / len(x)) + 1e-9


def test_factors_of_less_than_their_rank_are_padded(draw):
    x = draw.normal(size=(40, 2)) @ draw.normal(size=(2, 6))
    kernel = draw.normal(size=(6, 7))
    first, second = joined(x.T @ x / 40, kernel, 4)
    np.testing.assert_allclose(x @ first @ second, x @ kernel, atol=1e-6)
    assert not first[:, 2:].any()
    assert not second[2:].any()


def test_channels_that_stay_make_the_bound_least_of_all_subsets(draw):
    """Two queries to a key, and every choice of 3 of 6 channels."""
    scale = np.exp(draw.normal(size=6))
    queries, keys = draw.normal(size=(2, 20, 6)) * scale, draw.normal(size=(20, 6)) * scale[::-1]
    energy = lambda x: np.mean(x**2, axis=-2)
    scores = product_scores(energy(queries), energy(keys)[None])[0]
    kept = np.argsort(-scores)[:3]

    def bound(rows):
        gone = [i for i in range(6) if i not in rows]
        both = queries.reshape(-1, 6)
        return sum(np.linalg.norm(both[:, i]) * np.linalg.norm(keys[:, i]) for i in gone)

    def lost(rows):
        return np.linalg.norm(queries @ keys.T - queries[..., rows] @ keys[:, rows].T)

    bounds = {rows: bound(rows) for rows in itertools.combinations(range(6), 3)}
    np.testing.assert_allclose(bound(kept), min(bounds.values()))
    np.testing.assert_allclose(bound(kept), 20 * (scores.sum() - scores[kept].sum()))
    assert all(lost(list(rows)) <= limit for rows, limit in bounds.items())


def test_a_pair_is_worth_the_same_wherever_it_is_turned_to(draw):
    x = jnp.asarray(draw.normal(size=(1, 9, 2, 6)), jnp.float32)
    turned = rotate(x, jnp.arange(9)[None], jnp.asarray([1.0, 0.3, 0.1]))
    pairs = lambda y: np.square(np.asarray(y)).sum(1).reshape(2, 2, 3).sum(1)
    np.testing.assert_allclose(pairs(x), pairs(turned), rtol=1e-5)


def test_shares_have_their_mean_and_follow_influence(draw):
    influence, ones = draw.uniform(0, 0.5, 6), np.ones(6)
    free = shares(0.1, -influence / 0.5, ones, ones)
    softmax = np.exp(-influence / 0.5) / np.exp(-influence / 0.5).sum()
    np.testing.assert_allclose(free, 6 * 0.1 * softmax)
    even = shares(0.3, -influence / np.inf, ones, ones)
    np.testing.assert_allclose(even, 0.3)
    for epsilon, mean in itertools.product((1e-4, 0.05, 1.0), (0.0, 0.3, 0.6, 0.8)):
        most = np.asarray([0.8, 0.9, 0.8, 1.0, 0.8, 0.8])
        prices = draw.uniform(1, 3, 6)
        found = shares(mean, -influence / epsilon, prices, most)
        np.testing.assert_allclose(prices @ found / prices.sum(), mean, rtol=1e-12)
        assert np.all(found <= most + 1e-12)
        under = np.flatnonzero((found < most - 1e-12) & (found > 1e-12))
        ratios = np.log(found[under]) + influence[under] / epsilon
        np.testing.assert_allclose(ratios, np.full(len(under), ratios[:1]), rtol=1e-6)
    with pytest.raises(UsageError, match=r"90.00% shall go, and 80.00% can"):
        shares(0.9, -influence, ones, 0.8 * ones)


# Whole networks.


def test_a_whole_budget_is_the_identity():
    network = network_of("lm")
    same = narrowed(network, left=1.0)
    assert same.model == network.model
    jax.tree.map(np.testing.assert_array_equal, same.variables, network.variables)


@pytest.mark.parametrize("name", ["vit", "dit", "lm_pairs"])
def test_a_budget_is_met_by_a_network_that_its_definition_builds(name):
    network = network_of(name)
    layers = take_apart(network)
    prices, whole = costs(network, layers), macs(network)
    small = narrowed(network, left=0.75)
    dearest = max(
        price.of_unit(kind, sizes(layer))
        for price, layer in zip(prices, layers, strict=True)
        for kind in KINDS
        if kind != "heads"
    )
    assert 0.75 * whole - dearest < macs(small) <= 0.75 * whole
    made = jax.eval_shape(lambda: meta.unbox(small.task.init(jax.random.key(0), small.example)))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, dict(small.variables))
    assert abs(outputs(small) - outputs(network)) > 1e-5


@pytest.mark.parametrize("name", ["vit", "lm"])
def test_hidden_units_that_follow_from_others_go_for_nothing(name):
    """Odd units are even ones, or 0.7 of them where there is a gate."""
    network = network_of(name)

    def change(layer):
        ffn = jax.tree.map(jnp.array, layer.params["ffn"])
        for part in {"expand", "gate"} & set(ffn):
            factor = 0.7 if part == "expand" and "gate" in ffn else 1.0
            for leaf, values in ffn[part].items():
                ffn[part][leaf] = values.at[..., 1::2].set(factor * values[..., ::2])
        return {**layer.params, "ffn": ffn}

    network = edited(network, change)
    fields = dict(kinds=("hidden",), left=half_of(network, "hidden"), epsilon=np.inf)
    small = narrowed(network, in_turn=True, **fields)
    assert all(
        2 * sizes(now).hidden == sizes(before).hidden
        for now, before in zip(take_apart(small), take_apart(network), strict=True)
    )
    np.testing.assert_allclose(outputs(small), outputs(network), rtol=2e-3)


@pytest.mark.parametrize("case", ["dit", "lm", "no_output_bias"])
def test_values_of_a_low_rank_go_for_nothing(case):
    """Grouped queries, and biases that are no part of the rank where the output has one."""
    mixer = dict(kind="attention", heads=4, kv_heads=2, head_dim=8, causal=True, out_bias=False)
    network = tiny.language(mixer=mixer) if case == "no_output_bias" else network_of(case)
    if case == "no_output_bias":
        network = network.with_params(noisy(network.params))

    def change(layer):
        mixer = jax.tree.map(jnp.array, layer.params["mixer"])
        kernel = mixer["value"]["kernel"]  # [C, G, E]
        rank = kernel.shape[-1] // 2 - (case == "no_output_bias")  # and one of the bias
        mixing = jax.random.normal(jax.random.key(layer.number), (kernel.shape[1], rank, kernel.shape[-1]))
        mixer["value"]["kernel"] = jnp.einsum("cgr,gre->cge", kernel[..., :rank], mixing)
        return {**layer.params, "mixer": mixer}

    network = edited(network, change)
    held = take_apart(network)[0].params["mixer"]
    assert ("bias" in held["value"], "bias" in held["output"]) == {
        "dit": (True, True), "lm": (True, True), "no_output_bias": (True, False)
    }[case]  # fmt: skip
    small = narrowed(network, kinds=("value",), left=half_of(network, "value"), epsilon=np.inf)
    assert take_apart(small)[0].block.mixer.value_dim == held["value"]["kernel"].shape[-1] // 2
    np.testing.assert_allclose(outputs(small), outputs(network), rtol=2e-4)


@pytest.mark.parametrize("name", ["vit", "lm", "lm_pairs"])
def test_channels_of_queries_that_are_nothing_go(name, draw):
    """Other ones in every head, or the same pairs where heads are turned."""
    network = network_of(name)
    kept = {}

    def change(layer):
        mixer, has = jax.tree.map(jnp.array, layer.params["mixer"]), sizes(layer)
        turned = layer.turned or layer.block.mixer.rotary_base is not None
        rows = [np.sort(draw.permutation(has.qk)[: has.qk // 2]) for _ in range(1 if turned else has.heads)]
        kept[layer.number] = keep(layer, "qk", rows[0] if turned else np.stack(rows))
        for head in range(mixer["query"]["kernel"].shape[1]):
            row = rows[head % len(rows)]
            if turned:
                pairs = layer.block.mixer.rotary_pairs == "halves"
                row = np.r_[row, row + has.qk] if pairs else np.r_[2 * row, 2 * row + 1]
            alive = np.zeros(mixer["query"]["kernel"].shape[-1])
            alive[row] = 1
            values = mixer["query"]
            for leaf in values:
                at = (slice(None), head) if leaf == "kernel" else (head,)
                values[leaf] = values[leaf].at[at].multiply(alive if leaf == "bias" else alive[None])
        return {**layer.params, "mixer": mixer}

    network = edited(network, change)
    small = narrowed(network, kinds=("qk",), left=half_of(network, "qk"), epsilon=np.inf)
    for layer in take_apart(small):
        assert layer.block.mixer.rotary_kept == kept[layer.number].block.mixer.rotary_kept
    np.testing.assert_allclose(outputs(small), outputs(network), rtol=1e-4)


@pytest.mark.parametrize("listed", [False, True])
def test_influence_is_that_of_the_stream(listed):
    network = network_of("vit")
    if listed:
        first, *rest = take_apart(network)
        network = put_together(network, [keep(first, "hidden", range(5)), *rest])
    image = network.example["image"]
    run = jax.jit(lambda params: network.model.apply({"params": params}, image, mutable=["intermediates"]))
    _, sown = run(network.params)
    x = [np.asarray(each, np.float64) for each in streams(sown["intermediates"]["blocks"])]
    told = []
    narrowed(network, told, left=0.8)
    found = [float(re.search(r"influence ([\d.]+)", line)[1]) for line in told[:-1]]
    cosine = lambda a, b: np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    direct = [1 - np.mean(cosine(a, b)) for a, b in itertools.pairwise(x)]
    np.testing.assert_allclose(found, direct, atol=2e-4)
    assert abs(direct[0] - direct[1]) > 1e-3, "layers are told apart"


def test_what_cannot_be_narrowed_is_refused():
    with pytest.raises(UsageError, match=r"left=0.0 is a share"):
        MoDeGPT(left=0.0)
    with pytest.raises(UsageError, match=r"epsilon=0\.0"):
        MoDeGPT(epsilon=0.0)
    pyramid = build_kind(
        MODELS, swin(16, (1, 1), window=2, patch=1, head_dim=4, classes=5, drop_path=0.0), "config.model"
    )
    with pytest.raises(UsageError, match="pyramid are not followed"):
        narrowed(tiny.language().with_model(pyramid, {}))
    with pytest.raises(UsageError, match="shall go, and"):
        narrowed(tiny.language(), left=0.05)
    mixer = dict(kind="attention", heads=2, causal=True, qk_norm=True)
    with pytest.raises(UsageError, match="no layer has any of qk to lose"):
        narrowed(tiny.language(mixer=mixer), kinds=("qk",))
    with pytest.raises(UsageError, match="values are clipped"):
        narrowed(tiny.language(mixer=dict(kind="attention", heads=2, causal=True, clip=8.0)))
    network = tiny.language()
    network.params["blocks"]["ffn"]["expand"]["kernel"] *= np.nan
    with pytest.raises(UsageError, match="NaN or infinity"):
        narrowed(network)
