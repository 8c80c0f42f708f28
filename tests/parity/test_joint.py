"""The joint block against diffusers' of Stable Diffusion 3, with norms of queries and keys and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.blocks.test_joint import sd3
from tests.parity.record_joint import WIDTH, encoded, joint_block


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", ["rms_norm", None])
def test_joint_block(last, norm):
    theirs = joint_block(last, norm)
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    block, variables, shared = sd3(encoded(shapes), last, norm is not None)
    draw = np.random.default_rng(3)
    image, text, time = (
        draw.normal(size=(2, *s)).astype(np.float32) for s in ((10, WIDTH), (7, WIDTH), (WIDTH,))
    )
    with torch.no_grad():
        expected = theirs(*map(torch.from_numpy, (image, text, time)))
    given = (jnp.asarray(image), jnp.asarray(text)), None, shared(time)
    (ours, answer), _ = jax.jit(block.apply)(variables, *given)
    for got, wanted in ((ours, expected[1]), (answer, expected[0])):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert np.abs(got - wanted.numpy()).max() <= 1e-5 * wanted.abs().max().item()
