import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.recovery import apart, evaluated_output
from effjax.compress.steps.evopress import EvoPress, Keep, LeaveOut, evolved, mutated
from effjax.compress.steps.round import Round
from effjax.compress.steps.sparsify import Sparsify
from effjax.compress.storage.trees import held_bytes, stored_in, whole
from effjax.compress.storage.uniform import Uniform
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from tests.compress import tiny
from tests.compress.structure.networks import subject

COSTS = np.tile([6.0, 4.0, 2.0, 0.0], (6, 1))


def calibration(network, told=None):
    report = (lambda said: None) if told is None else told.append
    return Calibration(lambda: iter([network.example] * 4), jax.random.key(3), report, network)


def rounded(bits):
    return Round(Uniform(bits, 8, symmetric=False), kernels=("blocks/.*",))


def kl(whole_network, network):
    output = jax.jit(lambda v: evaluated_output(network, v, network.example))(network.variables)
    goal = jax.jit(lambda v: evaluated_output(whole_network, v, network.example))(whole_network.variables)
    return float(apart(network, output, goal, 1.0, network.example.get("weights")))


def test_a_mutation_costs_nothing_and_changes_something():
    rng, rows = np.random.default_rng(0), np.arange(6)
    genome = np.array([0, 1, 2, 3, 1, 2])
    for _ in range(50):
        after = mutated(genome, COSTS, rng)
        assert COSTS[rows, after].sum() == COSTS[rows, genome].sum()
        assert set(after.tolist()) <= {0, 1, 2, 3}
        genome = after
    stuck = np.zeros(6, int)
    np.testing.assert_array_equal(mutated(stuck, COSTS, rng), stuck)


def test_a_separable_fitness_is_brought_to_its_best():
    """Each branch loses by itself: the best drops the least important ones."""
    rng = np.random.default_rng(1)
    importance = rng.permutation(np.arange(1.0, 11.0))
    costs = np.tile([1.0, 0.0], (10, 1))
    start = np.array([1] * 4 + [0] * 6)
    fitness = lambda genome, count: float(importance @ genome)
    genome, value = evolved(start, costs, fitness, rng, 60, 8, (2, 1), (1, 2))
    assert value == 1 + 2 + 3 + 4
    assert genome.sum() == 4


def test_a_later_selection_is_on_more_batches():
    asked = []

    def fitness(genome, count):
        asked.append(count)
        return float(genome @ np.arange(4.0))

    costs = np.tile([1.0, 0.0], (4, 1))
    evolved(np.array([1, 1, 0, 0]), costs, fitness, np.random.default_rng(0), 1, 8, (2, 1), (1, 5))
    assert asked[0] == 5, "the start is compared with the last selection"
    assert asked[1:].count(5) == 2
    assert asked[1] == 1


@pytest.mark.parametrize("name", ["lm", "vit"])
def test_what_is_found_is_built_costs_the_same_and_is_no_worse(name):
    network, told = subject(name), []
    step = EvoPress((rounded(4), rounded(3), rounded(2)), like=1, generations=3, offspring=6,
                    survivors=(2, 1), batches=(1, 1))  # fmt: skip
    found = step.apply(network, calibration(network, told))
    uniform = rounded(3).apply(network, calibration(network))
    assert held_bytes(found.params) == held_bytes(uniform.params)
    assert kl(network, found) <= kl(network, uniform) * (1 + 1e-5)
    assert {leaf.layout.bits for leaf in stored_in(found.params).values()} <= {2, 3, 4}
    before, after = (float(told[0].split()[at].rstrip(",")) for at in (1, 5))  # KL .. at the start, ..
    assert after <= before
    np.testing.assert_allclose(kl(network, found), after, rtol=1e-3)


def test_a_branch_that_gives_nothing_is_left_out():
    network = subject("vit")
    layers = list(take_apart(network))
    quiet = dict(layers[1].params)
    quiet["ffn"] = {**quiet["ffn"], "contract": jax.tree.map(jnp.zeros_like, quiet["ffn"]["contract"])}
    layers[1] = dataclasses.replace(layers[1], variables={**layers[1].variables, "params": quiet})
    network = put_together(network, layers)
    step = EvoPress((Keep(), LeaveOut()), share=0.7, genes="branches", branches=("ffn",), generations=8,
                    offspring=4, survivors=(1,), batches=(1,))  # fmt: skip
    found = step.apply(network, calibration(network))
    assert [block.ffn is None for block in found.model.layer_blocks] == [
        i == 1 for i in range(network.model.depth)
    ]
    np.testing.assert_allclose(kl(network, found), 0, atol=1e-6)


def test_zeros_keep_their_number():
    network = tiny.language()
    step = EvoPress((Sparsify(0.25), Sparsify(0.5), Sparsify(0.75)), like=1, generations=2, offspring=3,
                    survivors=(1,), batches=(1,))  # fmt: skip
    found = step.apply(network, calibration(network))
    zeros = sum(int((leaf.kernel == 0).sum()) for leaf in stored_in(found.params).values())
    size = sum(leaf.kernel.size for leaf in stored_in(found.params).values())
    assert zeros == size // 2
    assert jax.tree.leaves(whole(found.params, jnp.float32))


def test_bad_searches_are_refused():
    with pytest.raises(UsageError, match="two levels"):
        EvoPress((Keep(),))
    with pytest.raises(UsageError, match="like=5"):
        EvoPress((Keep(), LeaveOut()), like=5, genes="branches")
    with pytest.raises(UsageError, match="last survivor"):
        EvoPress((Keep(), LeaveOut()), survivors=(2,), batches=(1,), genes="branches")
    with pytest.raises(UsageError, match="genes='branches'"):
        EvoPress((Keep(), LeaveOut()))
    network = tiny.language()
    with pytest.raises(UsageError, match="less than the last level"):
        EvoPress((Keep(), rounded(4)), share=0.01).apply(network, calibration(network))
