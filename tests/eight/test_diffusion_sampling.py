"""The same pictures on eight devices as on one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.samplers import DDPMSampler
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.dit import DiT
from effjax.parallel.mesh import MeshShape, make_mesh
from effjax.parallel.sharding import activate, batch_sharding, merge_rules
from effjax.train.tasks.diffusion import Diffusion
from experiments.run.sampling import Request, draw
from tests.train.toy import program_of

SHAPE = (4, 4, 1)


def test_sampling_does_not_depend_on_devices():
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
    model = DiT(block=block, patch=2, dim=8, depth=1, classes=3, frequencies=8)
    task = Diffusion(model=model, process=DDPM())
    batch = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
    shapes = meta.unbox(jax.eval_shape(task.init, jax.random.key(0), batch))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)

    how = Sampling(DDPMSampler(3, clip=1.0), guidance=2.0)

    @jax.jit
    def run(variables, label, index):
        keys = example_keys(jax.random.key(3), index)
        return sample_classes(task, variables, label, SHAPE, how, keys)

    index = jnp.arange(16)
    alone = run(variables, index % 3, index)
    mesh, rules = make_mesh(MeshShape(data=4, tensor=2)), merge_rules({})
    with activate(mesh, rules):
        spread = run(variables, *jax.device_put((index % 3, index), batch_sharding(mesh, rules)))
    assert spread.sharding.shard_shape(spread.shape)[0] == 4
    np.testing.assert_allclose(spread, alone, rtol=1e-4, atol=1e-5)


def test_a_seed_draws_the_same_picture_on_eight_devices_as_on_one():
    module, request = "configs.diffusion.dit", Request(classes=(3, 1, 7), per_class=3, guidance=2.0, steps=3)
    alone = program_of(module, devices=jax.devices()[:1], evaluators={})
    shapes = {"params": alone.shapes.params}
    numbers = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * numbers.normal(size=leaf.shape), leaf.dtype), shapes
    )
    pictures, columns = draw(alone, variables, request)
    assert columns == 3
    assert len({picture.tobytes() for picture in pictures}) == 9
    spread = program_of(module, mesh={"data": 4, "tensor": 2}, evaluators={})
    np.testing.assert_array_equal(draw(spread, variables, request)[0], pictures)
    states, _ = draw(alone, variables, Request(classes=(3, 1), guidance=2.0, steps=3, trajectory=3))
    found, _ = draw(spread, variables, Request(classes=(3, 1), guidance=2.0, steps=3, trajectory=3))
    np.testing.assert_array_equal(found, states)
