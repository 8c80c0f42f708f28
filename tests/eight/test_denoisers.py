"""Denoisers with parts of their own train on eight devices as on one: the same loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.diffusion.ddpm import DDPM
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.blocks.switch_dit import SwitchDiTBlock
from effjax.models.dit import DiT
from effjax.models.lego import Brick, Lego
from effjax.parallel.mesh import MeshShape, make_mesh
from effjax.parallel.sharding import activate, batch_sharding, merge_rules, parameter_shardings
from effjax.train.tasks.diffusion import Diffusion

PARTS = dict(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
SIZES = dict(dim=8, classes=3, frequencies=8)
MODELS = {
    "switch_dit": DiT(block=SwitchDiTBlock(**PARTS), patch=2, depth=2, learned_sigma=False, **SIZES),
    "lego": Lego(bricks=(Brick(2, 1, 1, share=0.5), Brick(4, 2, 1)), block=DiTBlock(**PARTS), **SIZES),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_does_not_depend_on_devices(name):
    task = Diffusion(model=MODELS[name], process=DDPM(sigma="large"))
    draw, key = np.random.default_rng(0), jax.random.key(0)
    batch = {
        "image": jnp.asarray(draw.normal(size=(8, 4, 4, 1)), jnp.float32),
        "label": jnp.arange(8) % 3,
    }
    boxed = jax.eval_shape(task.init, key, batch)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), meta.unbox(boxed))

    @jax.jit
    def step(variables, batch):
        prepared = task.prepare(batch, key)

        def loss(params):
            means, _ = task.loss({"params": params}, prepared, key)
            return means["loss"].value()

        return jax.value_and_grad(loss)(variables["params"])

    alone, slope = step(params, batch)
    mesh, rules = make_mesh(MeshShape(data=4, tensor=2)), merge_rules({})
    with activate(mesh, rules):
        placed = jax.device_put(params, parameter_shardings(boxed, mesh, rules))
        spread, slopes = step(placed, jax.device_put(batch, batch_sharding(mesh, rules)))
    assert float(spread) == pytest.approx(float(alone), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), slopes, slope)
