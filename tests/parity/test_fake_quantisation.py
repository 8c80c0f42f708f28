"""Grids, their gradients and moving ranges against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from effjax.compress.rounding import fake_fitted
from effjax.compress.storage.fake import fake_inputs, followed
from effjax.compress.storage.inputs import affine_grid
from effjax.compress.storage.uniform import Uniform


def test_weights_a_channel_and_their_gradient():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(24, 6)).astype(np.float32)
    upstream = rng.normal(size=matrix.shape).astype(np.float32)
    layout = Uniform(4, 0, scale="float32")
    ours, pull = jax.vjp(lambda m: fake_fitted(layout, m), jnp.asarray(matrix))
    scale, _ = layout.fit(jnp.asarray(matrix))
    x = torch.tensor(matrix, requires_grad=True)
    theirs = torch.fake_quantize_per_channel_affine(
        x, torch.tensor(np.asarray(scale[0])), torch.zeros(6, dtype=torch.int32), 1, -7, 7
    )
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)
    theirs.backward(torch.tensor(upstream))
    np.testing.assert_array_equal(pull(jnp.asarray(upstream))[0], x.grad.numpy())


def test_what_enters_and_its_gradient():
    rng = np.random.default_rng(1)
    observer = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.01)
    known = {"low": jnp.zeros(()), "high": jnp.zeros(()), "steps": jnp.zeros((), jnp.int32)}
    for _ in range(5):
        x = rng.normal(size=(3, 40)).astype(np.float32)
        observer(torch.tensor(x))
        known = followed(known, jnp.min(x), jnp.max(x), 0.99)
    np.testing.assert_allclose(known["low"], observer.min_val.item(), rtol=1e-6)
    np.testing.assert_allclose(known["high"], observer.max_val.item(), rtol=1e-6)
    scale, zero = observer.calculate_qparams()
    ours = affine_grid(known["low"], known["high"], 8)
    np.testing.assert_allclose(ours[0], scale.item(), rtol=1e-6)
    assert ours[1] + 128 == zero.item()
    x = (2 * rng.normal(size=200)).astype(np.float32)
    quantised, pull = jax.vjp(lambda x: fake_inputs(x, known["low"], known["high"], 8), jnp.asarray(x))
    t = torch.tensor(x, requires_grad=True)
    theirs = torch.fake_quantize_per_tensor_affine(t, scale.item(), zero.item(), 0, 255)
    np.testing.assert_allclose(quantised, theirs.detach().numpy(), atol=1e-6)
    theirs.sum().backward()
    np.testing.assert_array_equal(pull(jnp.ones(200))[0], t.grad.numpy())
    assert 0 < t.grad.sum() < 200
