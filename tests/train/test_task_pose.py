import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.train.tasks import Pose
from effjax.train.tasks.mean import values


class Linear(nn.Module):
    joints: int = 3

    @nn.compact
    def __call__(self, seen, train=False):
        return nn.Dense(3)(seen)


def batch(count=4):
    rng = np.random.default_rng(0)
    return {
        "seen": jnp.asarray(rng.standard_normal((count, 5, 3, 2)), jnp.float32),
        "joints": jnp.asarray(rng.standard_normal((count, 5, 3, 3)), jnp.float32),
        "mask": jnp.ones(count),
    }


def test_loss_is_its_equation():
    task, data = Pose(Linear(), weights=(1.0, 2.0, 0.5), smoothness=0.5, velocity=2.0), batch()
    variables = task.init(jax.random.key(0), data)
    p = np.asarray(task.model.apply(variables, data["seen"]), np.float64)
    y = np.asarray(data["joints"], np.float64)
    w = np.array([1.0, 2.0, 0.5])
    step = lambda x: x[:, 1:] - x[:, :-1]
    length = lambda x: np.sqrt((x**2).sum(-1))
    expected = (w * length(p - y)).mean() + 0.5 * (w[:, None] * step(p) ** 2).mean()
    expected += 2.0 * length(step(p) - step(y)).mean()
    got = values(task.loss(variables, data, jax.random.key(1))[0])
    np.testing.assert_allclose(got["loss"], expected, rtol=1e-5)
    p[:, :, 0] = 0.0  # the root is known to be in its place
    np.testing.assert_allclose(got["mpjpe"], length(p - y).mean(), rtol=1e-5)
    seen = values(task.metrics(variables, data))
    np.testing.assert_allclose(seen["loss"], expected, rtol=1e-5)


def test_rows_without_mask_do_not_count():
    task, data = Pose(Linear(), root=None), batch()
    variables = task.init(jax.random.key(0), data)
    broken = data | {"joints": data["joints"].at[2:].set(jnp.nan), "mask": jnp.array([1.0, 1.0, 0.0, 0.0])}
    half = {name: value[:2] for name, value in data.items()}
    for name, value in values(task.metrics(variables, broken)).items():
        np.testing.assert_allclose(value, values(task.metrics(variables, half))[name], rtol=1e-6)


def test_a_joint_in_its_place_has_no_gradient_and_no_nan():
    task, data = Pose(Linear(), velocity=1.0), batch()
    variables = task.init(jax.random.key(0), data)
    exact = data | {"joints": task.model.apply(variables, data["seen"])}
    loss = lambda v: task.loss(v, exact, jax.random.key(0))[0]["loss"].value()
    value, grads = jax.value_and_grad(loss)(variables)
    assert float(value) == 0.0
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("fields", "message"), [(dict(weights=(1.0,)), "1 weights for 3"), (dict(root=3), "root=3")]
)
def test_what_does_not_fit_the_body_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        Pose(Linear(), **fields)
