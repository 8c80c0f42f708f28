import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.folded import folded
from effjax.compress.merge import merge
from effjax.compress.steps.round import Round
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError
from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense
from effjax.train.tasks.classification import Classification

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 8)), jnp.float32)
EIGHT = Uniform(8, 0, scale="float32")


def shaken(variables, draw):
    """Batch statistics and affine parameters that hide no mistake."""

    def leaf(path, value):
        name = path[-1].key
        noise = jnp.asarray(draw.uniform(0.5, 1.5, value.shape), jnp.float32)
        return value * noise if name in ("scale", "var") else value + noise - 1 if value.ndim == 1 else value

    return jax.tree_util.tree_map_with_path(leaf, meta.unbox(variables))


CASES = (
    ConvNorm(5, 3, use_bias=True, activation="relu"),
    ConvNorm(None, 3, depthwise=True),
    ConvNorm(6, 1),
)


@pytest.mark.parametrize("plain", CASES, ids=["dense", "depthwise", "pointwise"])
def test_without_rounding_it_is_the_batch_norm_before_and_behind_the_freeze(plain, draw):
    variables = shaken(jax.jit(plain.init)(jax.random.key(0), X), draw)
    ours = folded(plain, None, freeze=1)

    @jax.jit
    def run(variables):
        first, changed = ours.apply(
            {**variables, "ranges": {"steps": jnp.zeros((), jnp.int32)}},
            X,
            True,
            mutable=["batch_stats", "ranges"],
        )
        second, kept = ours.apply({**variables, **changed}, X, True, mutable=["batch_stats", "ranges"])
        theirs, moved = plain.apply(variables, X, True, mutable=["batch_stats"])
        used = plain.apply({**variables, **moved}, X)
        return first, changed, second, kept, theirs, moved, used

    first, changed, second, kept, theirs, moved, used = run(variables)
    np.testing.assert_allclose(first, theirs, atol=2e-5)  # training is that of the batch
    for a, b in zip(jax.tree.leaves(changed["batch_stats"]), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(second, used, atol=2e-5)  # frozen it is that of the running averages
    for a, b in zip(
        jax.tree.leaves(kept["batch_stats"]), jax.tree.leaves(changed["batch_stats"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert kept["ranges"]["steps"] == 2


def test_what_is_trained_is_the_merged_convolution_in_codes(draw):
    ours = folded(CASES[0], EIGHT)
    variables = shaken(ours.init(jax.random.key(0), X), draw)
    trained = ours.apply(variables, X)
    definition, merged = merge(ours, {name: variables[name] for name in ("params", "batch_stats")})
    np.testing.assert_allclose(definition.apply(merged, X), CASES[0].apply(variables, X), atol=1e-5)
    kernel = merged["params"]["conv"]["kernel"].reshape(-1, 5)
    scale, zero = EIGHT.fit(kernel)
    codes = (EIGHT.codes(kernel, scale, zero) - zero) * scale
    merged["params"]["conv"]["kernel"] = codes.reshape(3, 3, 8, 5)
    np.testing.assert_allclose(definition.apply(merged, X), trained, atol=1e-5)
    gradient = jax.grad(lambda params: jnp.sum(ours.apply({**variables, "params": params}, X) ** 2))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient(variables["params"])))


class Depthwise(nn.Module):
    """A small separable network."""

    @nn.compact
    def __call__(self, x, train=False):
        x = ConvNorm(16, 3, activation="relu", name="stem")(x, train)
        x = ConvNorm(None, 3, depthwise=True, activation="relu", name="depthwise")(x, train)
        x = ConvNorm(16, 1, activation="relu", name="pointwise")(x, train)
        return Dense(10, ("embed", None), name="head")(x.mean((1, 2)))


def test_one_scale_a_layer_ruins_a_depthwise_network_and_one_a_channel_saves_it(draw):
    """Batch norms let the channels of a depthwise kernel have scales that differ a thousandfold."""
    x = jnp.asarray(draw.normal(size=(64, 6, 6, 3)), jnp.float32)
    batch = {"image": x, "label": jnp.zeros(64, jnp.int32), "mask": jnp.ones(64)}
    task = Classification(model=Depthwise())
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), batch))
    scales = jnp.asarray(10 ** draw.uniform(-3, 1, 16), jnp.float32)
    kernel = variables["params"]["depthwise"]["conv"]["kernel"]
    variables["params"]["depthwise"]["conv"]["kernel"] = kernel * scales[None, None]
    _, moved = jax.jit(lambda v: task.model.apply(v, x, True, mutable=["batch_stats"]))(variables)
    for layer in moved["batch_stats"]:  # as if it had been trained: the averages are those of the data
        old, new = variables["batch_stats"][layer]["norm"], moved["batch_stats"][layer]["norm"]
        statistics = {"mean": new["mean"] * 10, "var": (new["var"] - 0.9 * old["var"]) * 10}
        variables["batch_stats"][layer] = {"norm": statistics}
    subject = Subject(task, variables, batch)
    answer = jax.jit(task.model.apply)
    exact = answer(variables, x)
    centred = exact - exact.mean(0, keepdims=True)

    def kept(group):
        calibration = Calibration(lambda: [batch], jax.random.key(0), report=lambda text: None)
        error = answer(Round(Uniform(8, group)).apply(subject, calibration).variables, x) - exact
        return float(jnp.sum(error**2) / jnp.sum(centred**2))

    assert kept(0) < 0.01
    assert kept(-1) > 0.3


def test_only_batch_norms_are_folded():
    with pytest.raises(UsageError, match="norm='group'"):
        folded(ConvNorm(4, norm="group"), EIGHT)
