import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.blocks import evaluated
from effjax.compress.steps.llama_nas import LlamaNas, Space, front, one_hot, predictor, searched, survivors
from effjax.compress.structure.cost import macs
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.masks import masked_loss
from effjax.compress.subject import Calibration, Subject
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.models import KINDS
from effjax.train.tasks.language import Language
from tests.compress.structure.networks import subject

CHOICES = (3, 2, 2, 2, 2, 2)


def calibration(network, told):
    return Calibration(lambda: iter([network.example] * 2), jax.random.key(0), told.append, network)


def objectives(genome):
    """The second falls with every gene, and with some of them much more."""
    return float(sum(genome)), float(-np.dot(genome, [3, 5, 1, 1, 8, 2]))


def dominates(one, other):
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


@pytest.mark.parametrize("name", ["lm", "vit"])
def test_what_is_built_costs_and_gives_what_was_measured(name):
    network = subject(name)
    space = Space.of(network, (0.5, 1.0), (0.25, 0.5, 1.0))
    loss = masked_loss(network, [evaluated(network.example)])
    assert space.macs(space.largest) == macs(network)
    for genome in ((0, 1, 2), (1, 0, 1)):
        small = put_together(network, space.built(genome))
        assert macs(small) == space.macs(genome)
        batch = evaluated(network.example)
        alone = jax.jit(lambda v, n=small, b=batch: n.task.metrics(v, b)["loss"].value())(small.variables)
        np.testing.assert_allclose(loss(space.masks(genome)), alone, rtol=1e-4)


def test_the_published_space_is_counted():
    """Llama 2 7B, and with 24 layers of all or half of the hidden units."""
    mixer = dict(kind="attention", heads=32, qkv_bias=False, out_bias=False, rotary_base=1e4, causal=True)
    block = dict(mixer=mixer, ffn=dict(kind="gated", hidden=11_008))
    model = dict(kind="lm", block=block, vocab=32_000, dim=4096, depth=32, tied=False)
    task = Language(build_kind(KINDS, model, "config.model"))
    names = ("tokens", "targets", "segments", "positions")
    batch = {name: jnp.zeros((1, 8), jnp.int32) for name in names} | {"weights": jnp.ones((1, 8))}
    variables = meta.unbox(jax.eval_shape(task.init, jax.random.key(0), batch))
    found = []

    def parameters(params, genome):
        network = Subject(task, {"params": params}, batch)
        space = Space(take_apart(network), (24, 28, 32), ((5504, 11_008),) * 32, ())
        return put_together(network, space.built(genome)).params

    for genome in ((2, *[1] * 32), (0, *[1] * 32), (0, *[0] * 32)):
        made = jax.eval_shape(lambda p, g=genome: parameters(p, g), variables["params"])
        found.append(sum(leaf.size for leaf in jax.tree.leaves(made)))
    assert found == [6_738_415_616, 5_119_348_736, 3_496_153_088]
    space = Space((), (24, 28, 32), ((5504, 11_008),) * 32, ())
    assert space.count == 2**24 + 2**28 + 2**32


def test_the_front_is_what_nothing_dominates(draw):
    points = {(i,): (float(a), float(b)) for i, (a, b) in enumerate(draw.integers(0, 9, (60, 2)))}
    found = {points[genome] for genome in front(points)}
    free = {one for one in points.values() if not any(dominates(other, one) for other in points.values())}
    assert found == free


def test_nsga_2_keeps_whole_fronts_first():
    everyone = list(itertools.product(*map(range, CHOICES)))
    best = [g for g in everyone if not any(dominates(objectives(o), objectives(g)) for o in everyone)]
    kept = survivors(everyone, objectives, len(best))
    assert {objectives(genome) for genome in kept} <= {objectives(genome) for genome in best}
    assert len(kept) == len(best)


def test_the_predictor_knows_more_the_more_was_measured(draw):
    everyone = list(itertools.product(*map(range, CHOICES)))
    order = draw.permutation(len(everyone))
    values = {genome: objectives(genome) for genome in everyone}
    errors = []
    for count in (6, 40):
        known = {everyone[i]: values[everyone[i]] for i in order[:count]}
        weights = predictor(CHOICES, known)
        said = np.array([one_hot(CHOICES, genome) @ weights for genome in everyone])
        errors.append(np.corrcoef(said, [value for _, value in values.values()])[0, 1])
    assert errors[1] > errors[0]
    assert errors[1] > 0.999


def test_the_search_finds_the_front_with_few_measurements():
    choices = (2,) * 12
    weights = np.arange(1, 13)
    value = lambda genome: (float(sum(genome)), float(-np.dot(genome, weights)))
    how = LlamaNas(population=12, evaluations=120, generations=10)
    measured = searched(choices, value, lambda genome: value(genome)[0], how, np.random.default_rng(0))
    assert len(measured) <= 120 < 2**12
    found = {measured[genome] for genome in front(measured)}
    best = {(float(k), float(-weights[12 - k :].sum())) for k in range(13)}
    assert len(found & best) >= 11


def test_the_best_within_the_budget_is_built():
    network, told = subject("lm"), []
    step = LlamaNas(
        left=0.8, depths=(0.5, 1.0), widths=(0.5, 1.0), population=3, evaluations=8, generations=2
    )
    small = step.apply(network, calibration(network, told))
    assert macs(small) <= 0.8 * macs(network)
    assert "networks measured" in told[-1]
    assert all("of the MACs" in line for line in told[:-1])
    again = step.apply(network, calibration(network, []))
    assert again.model == small.model


def test_bad_searches_are_refused():
    with pytest.raises(UsageError, match=r"widths=\(0.0,\)"):
        LlamaNas(widths=(0.0,))
    with pytest.raises(UsageError, match="left=0"):
        LlamaNas(left=0.0)
    network = subject("lm")
    with pytest.raises(UsageError, match="less than the smallest"):
        LlamaNas(left=0.1, depths=(1.0,), widths=(1.0,)).apply(network, calibration(network, []))
