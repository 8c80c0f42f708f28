"""Branches that are computed at their own calls: what it equals, and what it leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.diffusion.caches import BlockwiseCache
from effjax.diffusion.caches.blockwise import everything
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, calibrated, walk_classes
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.diffusion.samplers import DDIMSampler, EulerSampler, HeunSampler
from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import Layer
from tests.diffusion.caches.test_taylor import LABEL, SHAPE, STEPS, task, variables

KEYS = example_keys(jax.random.key(1), jnp.arange(4))
DDIM, EULER = DDIMSampler(STEPS), EulerSampler(STEPS)


@functools.cache
def draw(cache, guidance=1.0, sampler=DDIM, process=None):
    """Pictures, and the memory at the end."""
    sampling = Sampling(sampler, guidance, cache=cache)

    @jax.jit
    def run(variables, keys):
        state, _ = walk_classes(task(process), variables, LABEL, SHAPE, sampling, keys)
        return state.x, state.memory

    return run(variables(), KEYS)


def planned(updates, union, guidance=1.0, sampler=DDIM, process=None):
    sampling = Sampling(sampler, guidance, cache=BlockwiseCache(updates, union))
    return calibrated(task(process), variables(), LABEL, SHAPE, sampling, KEYS).cache


@pytest.mark.parametrize(
    ("sampler", "process", "guidance"), [(DDIM, None, 1.0), (DDIM, None, 2.0), (EULER, RectifiedFlow(), 2.0)]
)
def test_as_many_updates_as_calls_are_the_sampler_itself_bit_for_bit(sampler, process, guidance):
    plain, _ = draw(None, guidance, sampler, process)
    cache = planned(STEPS, 0, guidance, sampler, process)
    assert np.all(cache.plan)
    pictures, memory = draw(cache, guidance, sampler, process)
    np.testing.assert_array_equal(pictures, plain)
    assert int(memory.branches) == STEPS * 3 * 2
    assert float(memory.whole_calls) == STEPS


def test_more_updates_are_nearer():
    plain, _ = draw(None)
    distances, computed = [], []
    for updates in (1, 3, 6, STEPS):
        pictures, memory = draw(planned(updates, 0))
        distances.append(float(jnp.mean(jnp.abs(pictures - plain))))
        computed.append(int(memory.branches))
    assert computed == [3 * 2 * n for n in (1, 3, 6, STEPS)]
    assert distances[0] > distances[1] > distances[2] > distances[3] == 0.0


def test_the_union_computes_more_and_never_less():
    fewer, more = np.asarray(planned(3, 0).plan), np.asarray(planned(3, 4).plan)
    assert np.all(more >= fewer)
    assert more.sum() > fewer.sum()


def test_stale_branches_are_what_they_were_by_a_loop():
    """The plan carried out by hand: every branch's own output, kept in a dictionary."""
    built = task()
    cache = planned(4, 1)
    plan, process = np.asarray(cache.plan), built.process
    stages, steps = built.stages(variables()), DDIM.plan(process)
    params = variables()["params"]["blocks"]
    x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), SHAPE))(KEYS)
    block, kept = built.model.block, {}

    @functools.partial(jax.jit, static_argnums=3)
    def layer(x, c, own, fresh, kept):
        """One block, with what it is to repeat handed in."""
        each = Layer(None, jnp.asarray(fresh), kept)
        return block.apply({"params": own}, x, each, c, Context())

    for i in range(STEPS):
        t = jnp.full(4, steps["t"][i])
        stream = stages.begin(x, t, LABEL)
        h = stream.x
        for number in range(3):
            own = jax.tree.map(lambda leaf, n=number: leaf[n], params)
            zeros = jnp.zeros((2, *h.shape))
            before = jnp.stack([kept.get((number, b), zeros[b]) for b in range(2)])
            h, now = layer(h, stream.c, own, tuple(map(bool, plan[i, number])), before)
            for branch in range(2):
                if plan[i, number, branch]:
                    kept[number, branch] = now[branch]
                else:
                    np.testing.assert_array_equal(now[branch], before[branch])
        x0, eps = process.to_x0_eps(stages.finish(stream.replace(x=h)), x, t)
        x = np.float32(steps["x0_weight"][i]) * x0 + np.float32(steps["eps_weight"][i]) * eps
    np.testing.assert_allclose(draw(cache)[0], x, rtol=2e-4, atol=2e-5)


def test_a_branch_that_is_not_fresh_is_not_computed():
    """Every branch stands in a conditional of its own, in the scan over layers."""
    built, cache = task(), planned(4, 0)

    def run(keys):
        return walk_classes(built, variables(), LABEL, SHAPE, Sampling(DDIM, cache=cache), keys)[0].x

    text = str(jax.make_jaxpr(run)(KEYS))
    assert text.count("cond[") == 2


def test_refusals():
    stages = task().stages(variables())
    with pytest.raises(UsageError, match="has no plan yet"):
        BlockwiseCache().wrap(stages, STEPS)
    with pytest.raises(UsageError, match="for 5 calls of 3 layers, and here are 12"):
        everything(5, stages).wrap(stages, STEPS)
    with pytest.raises(UsageError, match="updates=0 and union=3"):
        BlockwiseCache(updates=0)
    with pytest.raises(UsageError, match="updates=13 must lie between 1 and the 12 calls"):
        planned(13, 0)
    with pytest.raises(UsageError, match="one call a step"):
        planned(3, 0, sampler=HeunSampler(6), process=RectifiedFlow())
