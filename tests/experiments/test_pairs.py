"""From a flow to pairs of noise and picture, and on to the flow that learns them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.diffusion.instaflow import get_config
from effjax.data.arrays import Arrays, ArrayWriter
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.samplers import EulerSampler
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.train.program import build_program
from experiments.run import pairing
from experiments.run.sampling import Request
from tests.train.toy import program_of

FLOW = "configs.diffusion.instaflow"
REQUEST = Request(guidance=2.0, sampler="euler", steps=2, batch=8, seed=3)


@pytest.fixture(scope="module")
def flow():
    """A program and weights whose velocities are not zero, as they are at first."""
    program = program_of(FLOW)
    variables = program.variables(program.init(), ema=True)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    noisy = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), variables)
    return program, noisy


def rows(folder):
    reader = Arrays(str(folder)).open()
    return [reader[i] for i in range(len(reader))]


class Stopped(Exception):
    pass


class Fragile(ArrayWriter):
    """Stops before the second batch."""

    def write(self, first, values):
        if first:
            raise Stopped
        super().write(first, values)


def test_a_pair_is_where_the_sampler_starts_and_ends_and_stopping_changes_nothing(flow, tmp_path):
    program, variables = flow
    with ArrayWriter(tmp_path / "pairs", 20, {}) as writer:
        bent = pairing.write(program, variables, REQUEST, writer)
    assert bent > 0
    found = rows(tmp_path / "pairs")
    assert len(found) == 20
    shown = np.concatenate([batch["label"] for batch in program.data.evaluate()])
    np.testing.assert_array_equal([row["label"] for row in found], shown[:20])
    index = jnp.asarray([11, 17])  # in two different batches
    drawn = jax.jit(
        lambda variables, label: sample_classes(
            program.task,
            variables,
            label,
            (8, 8, 1),
            Sampling(EulerSampler(2), 2.0),
            example_keys(jax.random.key(3), index),
        )
    )(variables, jnp.asarray(shown[np.asarray(index)], jnp.int32))
    for at, picture in zip(index, drawn, strict=True):
        np.testing.assert_allclose(found[at]["image"], picture, atol=1e-5)
        assert np.abs(found[at]["noise"] - found[at]["image"]).max() > 0.01
    with contextlib.suppress(Stopped), Fragile(tmp_path / "again", 20, {}) as writer:
        pairing.write(program, variables, REQUEST, writer)
    with ArrayWriter(tmp_path / "again", 20, {}) as writer:
        assert writer.done == 8
        pairing.write(program, variables, REQUEST, writer)
    for one, other in zip(found, rows(tmp_path / "again"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("stage", "latest"), [("digits-reflow", False), ("digits-one-step", True)])
def test_the_next_flow_learns_from_pairs(flow, tmp_path, stage, latest):
    program, variables = flow
    with ArrayWriter(tmp_path / "pairs", 64, {}) as writer:
        pairing.write(program, variables, REQUEST, writer)
    config = get_config(stage)
    config.model = get_config("smoke").model
    config.data.source.root = str(tmp_path / "pairs")
    config.train.start = None
    experiment = resolve(config)
    later = build_program(experiment, experiment.data.open())
    assert jax.tree.map(jnp.shape, later.shapes.params) == jax.tree.map(jnp.shape, program.shapes.params)
    batch = {name: jnp.asarray(value) for name, value in next(later.data.train()).items()}
    ready = later.task.prepare(batch, jax.random.key(1))
    np.testing.assert_array_equal(ready["noise"], batch["noise"])
    np.testing.assert_array_equal(ready["label"], batch["label"])  # guidance is in the pairs
    assert bool((ready["time"] == 1).all()) == latest


def test_bad_requests(tmp_path):
    vision = program_of("vision")
    with pytest.raises(UsageError, match="--count=0 must be at least 1"):
        pairing.checked(program_of(FLOW), "runs/flow", 0)
    with pytest.raises(UsageError, match="holds a classification run, and pairs need a diffusion run"):
        pairing.checked(vision, "runs/vit", None)
