"""AGVM: equally noisy modules move as without it, noisier ones less; its halves are those of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.errors import UsageError
from effjax.train.agvm import Agvm
from effjax.train.durations import Budget
from effjax.train.optimizers import AdamW, Momentum
from effjax.train.stability import counts
from effjax.train.state import TrainState
from effjax.train.step import Precision, make_step
from effjax.train.tasks.mean import Mean
from tests.train.toy import program_of

BUDGET = Budget(total_steps=100, batch_size=1)
PARAMS = {"backbone": {"kernel": jnp.zeros((40, 50))}, "head": {"kernel": jnp.zeros((2000,))}}
MODULES = ("backbone/.*", "head/.*")


def transformation(agvm, kind=Momentum, **more):
    return kind(lr=0.1, agvm=agvm, **more).transformation(PARAMS, BUDGET)


def ran(agvm, halves, steps=1, kind=Momentum, **more):
    """Updates and scales after steps with the same halves."""
    made = transformation(agvm, kind, **more)
    state = made.init(PARAMS)
    whole = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    update = jax.jit(made.update)
    for _ in range(steps):
        updates, state = update(whole, state, PARAMS, halves=halves)
    return updates, optax.tree.get(state, "scales")


def noisy(draw, *levels):
    """Two halves: a gradient of ones, and of each module noise of a variance of its own."""
    return tuple(
        {
            name: {
                "kernel": 1.0 + jnp.asarray(level**0.5 * draw.normal(size=part["kernel"].shape), jnp.float32)
            }
            for level, (name, part) in zip(levels, PARAMS.items(), strict=True)
        }
        for _ in range(2)
    )


@pytest.mark.parametrize("kind", [Momentum, AdamW])
def test_equally_noisy_modules_move_as_without(kind, draw):
    half = draw.normal(size=2000).astype(np.float32)
    other = half + draw.normal(size=2000).astype(np.float32)
    # Both modules have the same numbers, the second ten times as large: a cosine does not see sizes.
    halves = tuple(
        {"backbone": {"kernel": jnp.asarray(x.reshape(40, 50))}, "head": {"kernel": jnp.asarray(10 * x)}}
        for x in (half, other)
    )
    updates, scales = ran(Agvm(MODULES, ema=0.0, every=1, start="0 steps"), halves, 3, kind)
    np.testing.assert_allclose(scales, 1.0, rtol=1e-4)
    plain = kind(lr=0.1).transformation(PARAMS, BUDGET)
    state = plain.init(PARAMS)
    for _ in range(3):
        expected, state = plain.update(jax.tree.map(lambda a, b: (a + b) / 2, *halves), state, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), updates, expected)


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5])
def test_a_noisier_module_moves_less_by_the_root_of_its_noise(noise, draw):
    """1 - cos of ones with noise of variance s in both halves is s / (1 + s)."""
    agvm = Agvm(MODULES, ema=0.0, every=1, start="0 steps", least=1e-3)
    halves = noisy(draw, 0.05, noise)
    updates, scales = ran(agvm, halves)
    share = lambda s: s / (1 + s)
    np.testing.assert_allclose(scales, [1.0, np.sqrt(share(0.05) / share(noise))], rtol=0.1)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)["head"]["kernel"]
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * scales[1] * mean, rtol=1e-5)


def test_bounds_averages_and_when_it_looks(draw):
    halves = noisy(draw, 0.05, 5.0)
    agvm = Agvm(MODULES, ema=0.9, every=4, start="2 steps", least=0.49)
    # It looks after 4 and 8 steps; the quotient is far below its bound.
    for steps, looks in ((4, 0), (5, 1), (8, 1), (9, 2)):
        scale = 1.0
        for _ in range(looks):
            scale = 0.9 * scale + 0.1 * 0.7
        np.testing.assert_allclose(ran(agvm, halves, steps)[1], [1.0, scale], rtol=1e-5)


def test_what_no_module_matches_is_left(draw):
    params = PARAMS | {"norm": {"scale": jnp.zeros((3,))}}
    agvm = Agvm(MODULES, ema=0.0, every=1, start="0 steps")
    made = Momentum(lr=0.1, agvm=agvm).transformation(params, BUDGET)
    halves = tuple(half | {"norm": {"scale": jnp.ones((3,))}} for half in noisy(draw, 0.05, 0.5))
    whole = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    updates, state = jax.jit(made.update)(whole, made.init(params), params, halves=halves)
    assert optax.tree.get(state, "scales")[1] < 0.9
    np.testing.assert_allclose(updates["norm"]["scale"], -0.1, rtol=1e-6)


def test_a_module_without_parameters_is_refused():
    agvm = Agvm(("head/.*", "nothing/.*"))
    with pytest.raises(UsageError, match="matches no parameter"):
        transformation(agvm)
    with pytest.raises(UsageError, match=r"modules\[1\]: 'head/kernel' is left no parameter"):
        transformation(Agvm((".*", "head/kernel")))


@pytest.mark.parametrize("numbers", [dict(modules=("a",)), dict(ema=1.0), dict(every=0), dict(least=2.0)])
def test_numbers_that_make_no_sense(numbers):
    with pytest.raises(UsageError, match="agvm"):
        Agvm(**{"modules": MODULES} | numbers)


class Squares:
    """Two linear layers in a row, without chance: loss = (x backbone head - y)^2 a row."""

    def prepare(self, batch, key):
        return batch

    def loss(self, variables, batch, key):
        params = variables["params"]
        found = batch["x"] @ params["backbone"]["kernel"] @ params["head"]["kernel"]
        return {"loss": Mean.of(jnp.square(found - batch["y"]))}, {}


def test_the_halves_are_the_even_and_the_odd_micro_batches(draw):
    x, y = draw.normal(size=(24, 5)), draw.normal(size=24)
    backbone, head = draw.normal(size=(5, 3)), draw.normal(size=3)
    single = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    params = single({"backbone": {"kernel": backbone}, "head": {"kernel": head}})
    agvm = Agvm(MODULES, ema=0.0, every=1, start="0 steps", least=1e-6, most=1e6)
    outcomes = []
    for chosen in (agvm, None):
        optimizer = Momentum(lr=0.01, agvm=chosen).transformation(params, BUDGET)
        step = make_step(Squares(), optimizer, precision=Precision(), accumulate=4, halves=chosen is not None)
        state = TrainState.create(params=params, opt_state=optimizer.init(params), key=jax.random.key(0))
        outcomes.append(jax.jit(step)(state, single({"x": x, "y": y})))
    (state, metrics), (plain, _) = outcomes

    def slopes(rows):
        off = 2 * (x[rows] @ backbone @ head - y[rows])
        return np.outer(off @ x[rows], head), off @ (x[rows] @ backbone)

    # Of 4 micro-batches the first has the rows 0, 4, 8, ...
    halves = [slopes(np.arange(24) % 2 == odd) for odd in (0, 1)]
    noise = [1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for a, b in zip(*halves, strict=True)]
    wanted = np.sqrt(noise[0] / noise[1])
    np.testing.assert_allclose(metrics["module_scale_1"], wanted, rtol=1e-3)
    moved, would = (
        jax.tree.map(lambda a, b: np.asarray(a - b), one.params, params) for one in (state, plain)
    )
    np.testing.assert_allclose(moved["backbone"]["kernel"], would["backbone"]["kernel"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        moved["head"]["kernel"], wanted * would["head"]["kernel"], rtol=1e-3, atol=1e-7
    )


def test_an_odd_number_of_micro_batches_is_refused():
    with pytest.raises(UsageError, match=r"config\.train\.accumulate is 3"):
        make_step(Squares(), optax.identity(), precision=Precision(), accumulate=3, halves=True)


@pytest.mark.slow
def test_a_run_tells_the_scales():
    agvm = dict(modules=("(?!head).*", "head/.*"), every=1, start="0 steps")
    program = program_of(
        "vision", evaluators={}, train__steps="4 steps", train__accumulate=2, optimizer__agvm=agvm
    )
    state, batch = program.init(), next(program.data.train())
    for _ in range(2):
        state, metrics = program.step(state, batch)
    assert 0.5**0.5 <= metrics["module_scale_1"] <= 10**0.5
    assert metrics["module_scale_1"] != 1.0


def test_scales_are_among_the_metrics():
    made = transformation(Agvm(MODULES))
    assert counts(made.init(PARAMS)) == {"module_scale_1": 1.0}
