import jax
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.layers.conv import Conv, ConvNorm
from effjax.layers.downsample import Convs, Merge, Patches

X = jax.random.normal(jax.random.key(0), (2, 7, 6, 4))


def made(module, *args):
    variables = meta.unbox(module.init(jax.random.key(1), *args))
    draw = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape)), variables["params"])
    return {**variables, "params": params}


def by_hand(x, kernel, stride, side):
    x = np.pad(np.float64(x), ((0, 0), (side,) * 2, (side,) * 2, (0, 0)))
    k = kernel.shape[0]
    rows, columns = ((n - k) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        window = x[:, stride * i : stride * i + k, stride * j : stride * j + k]
        y[:, i, j] = np.einsum("buvc,uvco->bo", window, kernel)
    return y


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, None), (3, 2, None), (2, 2, 0), (7, 4, 2)])
def test_convolution_pads_all_sides_alike(kernel, stride, padding):
    conv = Conv(5, kernel, stride, padding)
    held = made(conv, X)
    side = kernel // 2 if padding is None else padding
    expected = by_hand(X, held["params"]["kernel"], stride, side) + held["params"]["bias"]
    np.testing.assert_allclose(conv.apply(held, X), expected, rtol=1e-4, atol=1e-4)


def test_groups_are_convolved_apart():
    conv = Conv(6, 3, groups=2, use_bias=False)
    held = made(conv, X)
    kernel = held["params"]["kernel"]
    halves = [by_hand(X[..., 2 * g : 2 * g + 2], kernel[..., 3 * g : 3 * g + 3], 1, 1) for g in range(2)]
    np.testing.assert_allclose(conv.apply(held, X), np.concatenate(halves, -1), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_convolved_is_refused():
    with pytest.raises(UsageError, match=r"groups=3 must divide the channels 4 and 6"):
        made(Conv(6, groups=3), X)
    with pytest.raises(UsageError, match=r"kernel of 7 x 7 does not fit on a map of 4 x 4"):
        made(Conv(6, 7, padding=0), X[:, :4, :4])
    with pytest.raises(UsageError, match=r"keeps 4 channels, not 6"):
        made(ConvNorm(6, depthwise=True), X)


@pytest.mark.parametrize(
    "options", [dict(kernel=3), dict(kernel=1, features=6), dict(kernel=3, depthwise=True, use_bias=True)]
)
def test_norm_and_activation_stand_behind(options):
    module = ConvNorm(**options, activation="relu")
    held = made(module, X)
    y, changed = module.apply(held, X, train=True, mutable=["batch_stats"])
    bare = ConvNorm(**options, norm=None)
    h = np.float64(bare.apply({"params": {"conv": held["params"]["conv"]}}, X))
    mean, variance = h.mean((0, 1, 2)), h.var((0, 1, 2))
    norm = held["params"]["norm"]
    expected = np.maximum((h - mean) / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"], 0)
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
    running = jax.tree.map(np.asarray, changed["batch_stats"]["norm"])
    np.testing.assert_allclose(running["mean"], 0.1 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * variance, rtol=1e-4)
    after = module.apply({**held, **changed}, X)  # in evaluation the running averages are used
    expected = (h - running["mean"]) / np.sqrt(running["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(after, np.maximum(expected, 0), rtol=1e-3, atol=1e-3)


def test_merging_reads_neighbours_down_before_right_and_fills_up_odd_sides():
    merge = Merge(norm="layer_plain")
    held = {"params": {"reduction": {"kernel": np.eye(16, dtype=np.float32)}}}
    y = merge.apply(held, X[:, :3], 16)
    assert y.shape == (2, 2, 3, 16)
    four = np.concatenate([X[:, 0, 0], X[:, 1, 0], X[:, 0, 1], X[:, 1, 1]], -1)
    four = (four - four.mean(-1, keepdims=True)) / np.sqrt(four.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y[:, 0, 0], four, rtol=1e-4, atol=1e-4)
    low = np.concatenate([X[:, 2, 0], np.zeros((2, 4)), X[:, 2, 1], np.zeros((2, 4))], -1)
    low = (low - low.mean(-1, keepdims=True)) / np.sqrt(low.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y[:, 1, 0], low, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("edge", "shape"), [("pad", (2, 2, 2, 5)), ("crop", (2, 1, 1, 5))])
def test_patches_at_the_edge(edge, shape):
    module = Patches(4, edge=edge)
    held = made(module, X, 5)
    assert module.apply(held, X, 5).shape == shape
    with pytest.raises(UsageError, match="7 x 6 cannot be cut into patches of 4 x 4"):
        Patches(4).apply(held, X, 5)


def test_patches_may_have_positions():
    module, plain = Patches(2, edge="crop", norm=None, positions=True), Patches(2, edge="crop", norm=None)
    held = made(module, X, 5)
    x = module.apply(held, X, 5)
    table = held["params"]["positions"].reshape(1, 3, 3, 5)
    rest = {"params": {"embed": held["params"]["embed"]}}
    np.testing.assert_allclose(x, plain.apply(rest, X, 5) + table, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="the position table holds 9 tokens and this picture makes 6"):
        module.apply(held, X[:, :4], 5)


def test_a_picture_smaller_than_a_patch_is_refused_where_patches_are_cut():
    with pytest.raises(UsageError, match="3 x 6 cannot be cut into patches of 4 x 4"):
        made(Patches(4, edge="crop"), X[:, :3], 5)


def test_convolutions_follow_one_another():
    layers = ConvNorm(3, stride=2, activation="relu"), ConvNorm(), ConvNorm(depthwise=True)
    module = Convs(layers, norm="layer")
    held = made(module, X, 8)
    assert module.apply(held, X, 8).shape == (2, 4, 3, 8)
    shapes = {name: layer["conv"]["kernel"].shape for name, layer in held["params"].items() if name != "norm"}
    assert shapes == {"layers_0": (3, 3, 4, 3), "layers_1": (3, 3, 3, 8), "layers_2": (3, 3, 8)}
