"""A video model cut over eight devices: the losses of one, and the same clips."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from effjax.diffusion import masks
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.known import Known
from effjax.diffusion.samplers import DDIMSampler
from effjax.parallel.sharding import activate
from tests.train.toy import losses_of_one_state, program_of

MODULE = "configs.diffusion.vdt"
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
CHANGES = {"train__steps": "3 steps", "train__log_every": "1 steps", "evaluators": {}}


def test_losses_are_those_of_one_device():
    one = program_of(MODULE, devices=jax.devices()[:1], **CHANGES)
    program = program_of(MODULE, mesh=MESH, **CHANGES)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(program.shapes.params)]
    assert any("tensor" in spec for spec in specs)
    single, found = losses_of_one_state(one, program)
    assert len(single) == 3
    np.testing.assert_allclose(found, single, rtol=1e-5)


def test_clips_of_which_frames_are_given_do_not_depend_on_devices():
    program = program_of(MODULE, mesh=MESH, **CHANGES)
    task, shape = program.task, program.data.example_batch(1)["video"].shape[1:]
    shapes = jax.eval_shape(task.init, jax.random.key(0), program.data.example_batch(1))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda s: jnp.asarray(0.2 * draw.normal(size=s.shape), s.dtype), meta.unbox(shapes)
    )
    content = jnp.asarray(draw.uniform(-1, 1, (8, *shape)), jnp.float32)
    index = jnp.arange(8)

    @jax.jit
    def run(variables, content, index):
        keys = example_keys(jax.random.key(3), index)
        known = Known(content, masks.draw_known((masks.RandomFrames(0.5),), keys, shape))
        labels = jnp.zeros_like(index)
        return sample_classes(task, variables, labels, shape, Sampling(DDIMSampler(3, clip=1.0)), keys, known)

    alone = run(variables, content, index)
    with activate(program.mesh, program.rules):
        spread = run(variables, *jax.device_put((content, index), program.batch_sharding))
    assert spread.sharding.shard_shape(spread.shape)[0] == 2
    np.testing.assert_allclose(spread, alone, rtol=1e-4, atol=1e-5)
