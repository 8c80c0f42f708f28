"""Confidence-gated forecasts: what they equal, what they are exact for, what they keep."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.diffusion.caches import ConfidenceTaylor
from effjax.diffusion.caches.taylor import Record
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes, walk_classes
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import DDIMSampler, EulerSampler, HeunSampler
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.dit import DiT
from effjax.train.tasks.diffusion import Diffusion

SHAPE = (4, 4, 1)
STEPS = 12
LABEL = jnp.arange(4) % 3


def task(process=None, depth=3):
    process = process or DDPM(sigma="small", prediction="v")
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
    model = DiT(block=block, patch=2, dim=8, depth=depth, classes=3, frequencies=8, learned_sigma=False)
    return Diffusion(model=model, process=process)


@functools.cache
def variables():
    batch = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
    shapes = meta.unbox(jax.eval_shape(task().init, jax.random.key(0), batch))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * draw.normal(size=s.shape), s.dtype), shapes)


@functools.cache
def draw(cache, guidance=1.0, sampler=None, process=None):
    """Pictures, and at how many calls all layers ran."""
    sampling = Sampling(sampler or DDIMSampler(STEPS), guidance, cache=cache)

    @jax.jit
    def run(variables, keys):
        state, _ = walk_classes(task(process), variables, LABEL, SHAPE, sampling, keys)
        return state.x, state.memory

    pictures, memory = run(variables(), example_keys(jax.random.key(1), jnp.arange(4)))
    return np.asarray(pictures), None if memory is None else int(memory.computed)


@pytest.mark.parametrize(
    ("sampler", "process", "guidance"),
    [
        (DDIMSampler(STEPS), None, 1.0),
        (DDIMSampler(STEPS), None, 2.0),
        (EulerSampler(STEPS), RectifiedFlow(), 2.0),
        (HeunSampler(STEPS // 2), RectifiedFlow(), 1.0),
    ],
)
def test_a_threshold_of_zero_is_the_sampler_itself_bit_for_bit(sampler, process, guidance):
    plain, _ = draw(None, guidance, sampler, process)
    cached, computed = draw(ConfidenceTaylor(threshold=0.0), guidance, sampler, process)
    np.testing.assert_array_equal(cached, plain)
    assert computed == STEPS


def test_the_looser_the_threshold_the_fewer_calls_and_the_farther_the_picture():
    plain, _ = draw(None, 2.0)
    counts, distances = [], []
    for threshold in (0.0, 0.01, 0.1, math.inf):
        pictures, computed = draw(ConfidenceTaylor(threshold, warmup=3), 2.0)
        counts.append(computed)
        distances.append(float(np.abs(pictures - plain).mean()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == STEPS
    assert counts[-1] == 3 + 1  # the first calls and the last
    assert distances[0] == 0.0
    assert distances[1] < distances[-1]


def test_of_order_zero_without_a_threshold_the_last_layer_is_repeated():
    """The features of the third call serve all that follow, until the last."""
    built, sampler = task(), DDIMSampler(STEPS)
    stages, process = built.stages(variables()), built.process
    plan, keys = sampler.plan(process), example_keys(jax.random.key(1), jnp.arange(4))
    x, kept = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), SHAPE))(keys), None

    @jax.jit
    def features(x, t):
        return stages.layers(stages.begin(x, t, LABEL), None)

    @jax.jit
    def head(x, t, kept):
        return stages.finish(stages.begin(x, t, LABEL).replace(x=kept))

    for i in range(STEPS):
        t = jnp.full(4, plan["t"][i])
        kept = features(x, t).x if i < 3 or i == STEPS - 1 else kept
        x0, eps = process.to_x0_eps(head(x, t, kept), x, t)
        x = np.float32(plan["x0_weight"][i]) * x0 + np.float32(plan["eps_weight"][i]) * eps
    got, _ = draw(ConfidenceTaylor(math.inf, order=0, first_order=0, warmup=3))
    np.testing.assert_allclose(got, x, rtol=2e-4, atol=2e-5)


def recorded(polynomial, calls, order, form):
    """A record of a feature that follows a polynomial in the calls."""
    like = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
    record = Record.empty(like, order)
    for call in calls:
        value = jnp.full((1, 1, 1), np.polyval(polynomial, call), jnp.float32)
        record = record.renewed(value, jnp.asarray(call, jnp.float32), form)
    return record


def forecast(polynomial, calls, order, form, at):
    return float(recorded(polynomial, calls, order, form).forecast(jnp.float32(at), form)[0, 0, 0])


@pytest.mark.parametrize("form", ["taylor", "newton"])
@pytest.mark.parametrize("calls", [(0, 1, 2, 3), (0, 3, 4, 7)])
def test_a_line_is_forecast_exactly(form, calls):
    for order in (1, 2, 3):
        assert forecast([2.0, -3.0], calls, order, form, 9) == pytest.approx(15.0, rel=1e-5)
    assert forecast([2.0, -3.0], calls, 0, form, 9) == pytest.approx(2.0 * calls[-1] - 3.0)


def test_newton_is_exact_for_its_order_at_any_calls_and_taylor_off_by_a_known_term():
    square, calls = [1.0, 0.0, 0.0], (0, 2, 4, 6)
    assert forecast(square, calls, 2, "newton", 9) == pytest.approx(81.0, rel=1e-5)
    assert forecast(square, (0, 1, 4, 6), 2, "newton", 9) == pytest.approx(81.0, rel=1e-5)
    assert forecast([1.0, 0.0, 0.0, 0.0], (0, 1, 4, 6), 3, "newton", 9) == pytest.approx(729.0, rel=1e-5)
    # k calls behind s it should be s^2 + 2 s k + k^2, but the first difference is 2 s - N for 2 s.
    distance, ahead = 2, 3
    assert forecast(square, calls, 2, "taylor", 9) == pytest.approx(81.0 - ahead * distance, rel=1e-5)


def test_orders_beyond_the_calls_so_far_count_as_none():
    assert forecast([2.0, -3.0], (5,), 3, "taylor", 9) == pytest.approx(7.0)
    assert forecast([1.0, 0.0, 0.0], (4, 6), 3, "newton", 7) == pytest.approx(36.0 + 10.0)


def test_two_features_are_kept_whatever_the_depth():
    def kept(depth):
        built = task(depth=depth)
        batch = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
        params = meta.unbox(jax.eval_shape(built.init, jax.random.key(0), batch))
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)
        denoiser = ConfidenceTaylor(order=2, first_order=1).wrap(built.stages(params), 9)
        memory = jax.eval_shape(
            lambda x: denoiser.start(x, jnp.zeros(4, jnp.int32), LABEL), jnp.zeros((4, *SHAPE))
        )
        return memory.first.differences.size + memory.last.differences.size

    assert kept(2) == kept(5) == (2 + 3) * 4 * 4 * 8  # examples, tokens, channels


def test_skipped_layers_are_not_computed():
    """The conditional stands in the program: its cheap branch has no matrix product."""
    built = task()

    def run(variables, keys):
        sampling = Sampling(DDIMSampler(STEPS), cache=ConfidenceTaylor())
        return sample_classes(built, variables, LABEL, SHAPE, sampling, keys)

    jaxpr = jax.make_jaxpr(run)(variables(), example_keys(jax.random.key(1), jnp.arange(4)))
    (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == STEPS]
    (choice,) = [e for e in scan.params["jaxpr"].eqns if e.primitive.name == "cond"]
    compute, skip = (str(branch) for branch in choice.params["branches"])
    if "scan" in skip:
        compute, skip = skip, compute
    assert "scan" in compute
    assert "erf" not in skip
    assert "tanh" not in skip
    assert "tanh" in compute


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold=-0.1 must not be negative"),
        ({"order": -1}, "order=-1"),
        ({"warmup": 0}, "warmup=0 must be at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UsageError, match=message):
        ConfidenceTaylor(**options)


def test_a_network_of_one_layer_has_nothing_to_skip():
    with pytest.raises(UsageError, match="has but one"):
        ConfidenceTaylor().wrap(task(depth=1).stages({"params": {"w": jnp.zeros(())}}), 9)
