import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.layers.pool import KINDS, GroupGeneralizedMean
from effjax.models.heads import Linear

X = jax.random.normal(jax.random.key(0), (3, 7, 12))


def pooled(x, exponents, **options):
    p = jnp.asarray(exponents, jnp.float32)
    pool = build_kind(KINDS, dict(kind="ggem", groups=len(p), **options), "pool")
    return pool.apply({"params": {"exponent": p}}, x)


def power_mean(x, exponents, epsilon=1e-6):
    x = np.maximum(np.asarray(x, np.float64), epsilon)
    out = np.zeros((x.shape[0], x.shape[2]))
    for c in range(x.shape[2]):
        p = exponents[c * len(exponents) // x.shape[2]]
        out[:, c] = np.mean(x[:, :, c] ** p, axis=1) ** (1 / p)
    return out


@pytest.mark.parametrize("exponents", [(3.0,), (0.5, 1.0, 2.0, 6.0), tuple(np.linspace(0.5, 5, 12))])
def test_equals_the_power_mean_of_each_group(exponents):
    np.testing.assert_allclose(pooled(X, exponents), power_mean(X, exponents), rtol=1e-4)


def test_an_exponent_of_one_is_the_average_and_a_large_one_the_largest():
    x = jnp.abs(X)
    np.testing.assert_allclose(pooled(x, [1.0]), x.mean(1), rtol=1e-5)
    np.testing.assert_allclose(pooled(x, [400.0] * 4), x.max(1), rtol=1e-2)


def test_the_order_of_tokens_does_not_matter():
    np.testing.assert_allclose(pooled(X[:, ::-1], [2.0, 5.0]), pooled(X, [2.0, 5.0]), rtol=1e-5)


def test_there_is_one_parameter_a_group_and_groups_must_divide():
    held = GroupGeneralizedMean(4).init(jax.random.key(0), X)
    assert [leaf.size for leaf in jax.tree.leaves(held)] == [4]
    with pytest.raises(UsageError, match="groups=5 does not divide the width 12"):
        GroupGeneralizedMean(5).init(jax.random.key(0), X)


def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        x, p = X.astype(jnp.float64), jnp.array([0.7, 3.0])

        def loss(p, x):
            return jnp.sum(jnp.sin(GroupGeneralizedMean(2).apply({"params": {"exponent": p}}, x)))

        on_p, on_x = jax.grad(loss, argnums=(0, 1))(p, x)
        for i in range(2):
            shift = 1e-6 * jnp.eye(2)[i]
            numeric = (loss(p + shift, x) - loss(p - shift, x)) / 2e-6
            np.testing.assert_allclose(on_p[i], numeric, rtol=1e-5)
        direction = jax.random.normal(jax.random.key(1), x.shape, jnp.float64)
        numeric = (loss(p, x + 1e-6 * direction) - loss(p, x - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(jnp.sum(on_x * direction), numeric, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_no_exponent_overflows_in_bfloat16(scale):
    x = (scale * jnp.abs(X)).astype(jnp.bfloat16)
    y = pooled(x, [60.0] * 4)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), power_mean(x, [60.0] * 4), rtol=1e-2)
    grad = jax.grad(lambda p: jnp.sum(pooled(x, p).astype(jnp.float32)))(jnp.full(4, 60.0))
    assert jnp.isfinite(grad).all()


def test_a_pyramid_head_pools_in_the_same_way():
    x = X.reshape(3, 7, 1, 12)
    head = Linear(norm=None, pool=GroupGeneralizedMean(3))
    held = head.init(jax.random.key(0), x, 0)
    assert held["params"].keys() == {"ggem_pool"}
    np.testing.assert_allclose(head.apply(held, x, 0), pooled(X, [3.0] * 3), rtol=1e-6)


def fitted(x, labels, learn, steps=300):
    """Exponents and accuracy of a linear classifier behind the pool; without `learn` they stay at 1."""
    start = {"p": jnp.ones(1), "w": jnp.zeros((x.shape[2], 2)), "b": jnp.zeros(2)}
    optimizer = optax.adam(3e-2)

    def logits(params):
        p = params["p"] if learn else jax.lax.stop_gradient(params["p"])
        y = GroupGeneralizedMean(1).apply({"params": {"exponent": p}}, x)
        return (y - y.mean(0, keepdims=True)) @ params["w"] + params["b"][None]

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params), labels).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), None, steps)[0][0])
    params = run()
    return float(params["p"][0]), float(jnp.mean(jnp.argmax(logits(params), 1) == labels))


def test_a_pattern_in_one_token_raises_the_exponent_and_the_accuracy():
    draw = np.random.default_rng(0)
    labels = draw.integers(2, size=256)
    x = np.abs(draw.normal(size=(256, 32, 4)))
    x[np.arange(256), draw.integers(32, size=256), labels] += 4.0  # one bright token, in one of two channels
    p, learned = fitted(jnp.float32(x), labels, learn=True)
    _, average = fitted(jnp.float32(x), labels, learn=False)
    assert p > 2
    assert learned > average + 0.05


def test_a_shift_of_all_tokens_keeps_the_exponent_near_one():
    draw = np.random.default_rng(1)
    labels = draw.integers(2, size=256)
    x = 3 + draw.normal(size=(256, 32, 4))
    x[:, :, 0] += 0.4 * labels[:, None]  # of which the mean says all there is to know
    p, learned = fitted(jnp.float32(x), labels, learn=True)
    assert abs(p - 1) < 0.5
    assert learned > 0.8
