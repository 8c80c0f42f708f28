"""Unified masks at work: a video model that learned all tasks at once predicts where a dot goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.diffusion import masks
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.known import Known
from effjax.diffusion.samplers import DDIMSampler
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.blocks.video import SpatioTemporalBlock
from effjax.models.vdt import VDT
from effjax.train.tasks.diffusion import Diffusion
from experiments.run.clips import Clips

FRAMES, SIDE, STEPS, BATCH = 4, 4, 700, 64
FORWARD = masks.Forward(given=2)


def dots(count, seed):
    """A bright dot on a torus that stays or moves to a neighbour a frame: `[count, 4, 4, 4, 1]`."""
    draw = np.random.default_rng(seed)
    velocity = draw.integers(-1, 2, (count, 2, 1))
    at = (draw.integers(0, SIDE, (count, 2, 1)) + velocity * np.arange(FRAMES)) % SIDE  # [count, 2, F]
    row, column = (at[:, axis, :, None] == np.arange(SIDE) for axis in (0, 1))
    bright = row[..., :, None] & column[..., None, :]  # [count, F, H, W]
    return np.where(bright, 1.0, -1.0).astype(np.float32)[..., None]


@pytest.mark.slow
def test_prediction_from_two_frames_beats_copying_the_last():
    """Verify (e)."""
    attention = dict(temporal=Attention(heads=2), mixer=Attention(heads=2))
    block = SpatioTemporalBlock(**attention, ffn=MLP(activation="gelu_tanh"))
    model = VDT(patch=4, dim=64, depth=2, frames=FRAMES, block=block, learned_sigma=False, frequencies=32)
    kinds = (FORWARD, masks.Backward(given=2))
    process = DDPM(sigma="small", prediction="x0")
    task = Diffusion(model, process, 0.0, content="video", condition=None, masks=kinds)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

    @jax.jit
    def train(clips, key):
        params = meta.unbox(task.init(key, {"video": clips[0]}))["params"]

        def step(state, at):
            params, moments = state
            clips, key = at
            batch = task.prepare({"video": clips}, key)

            def loss(params):
                return task.loss({"params": params}, batch, key)[0]["loss"].value()

            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        state = params, optimizer.init(params)
        return jax.lax.scan(step, state, (clips, jax.random.split(key, STEPS)))[0][0]

    clips = jnp.asarray(dots(STEPS * BATCH, 0).reshape(STEPS, BATCH, FRAMES, SIDE, SIDE, 1))
    variables = {"params": train(clips, jax.random.key(0))}

    content = dots(32, 1)
    keys = example_keys(jax.random.key(2), jnp.arange(32))
    known = masks.draw_known((FORWARD,), keys, content.shape[1:])

    @jax.jit
    def predict(variables):
        how, labels = Sampling(DDIMSampler(8)), jnp.zeros(32, jnp.int32)
        return sample_classes(task, variables, labels, content.shape[1:], how, keys, Known(content, known))

    held_out = Clips(content, np.asarray(known), np.zeros(32, np.int32))
    drawn = np.asarray(predict(variables))
    np.testing.assert_array_equal(drawn[:, :2], content[:, :2])
    assert held_out.error(drawn) < 0.3 * held_out.error(held_out.copied())
