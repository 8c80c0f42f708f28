import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.layers.stack import Layers, Stack, apart


class Layer(nn.Module):
    """x <- x + each * Dense(x) + shared, and the input's mean as its output."""

    @nn.compact
    def __call__(self, x, each, shared, train=False):
        h = Dense(x.shape[-1], ("embed", "mlp"), name="dense")(x)
        if train:
            h = nn.Dropout(0.5, deterministic=False)(h)
        return x + each * h + shared[None], jnp.mean(x)


DEPTH = 4
EACH = jnp.arange(1.0, DEPTH + 1)
SHARED = jnp.array([0.1, 0.2, 0.3])
X = jax.random.normal(jax.random.key(1), (2, 3))


def variables(stack):
    return stack.init(jax.random.key(0), X, SHARED, each=EACH)


@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"remat": "dots"}, {"unroll": 4}, {"unroll": 3}])
def test_equals_its_blocks_one_after_another(options):
    stack = Stack(Layer(), DEPTH, **options)
    params = meta.unbox(variables(stack))

    def one_by_one(params):
        x, means = X, []
        for i in range(DEPTH):
            layer = jax.tree.map(lambda p, i=i: p[i], params["params"])
            x, mean = Layer().apply({"params": layer}, x, EACH[i], SHARED)
            means.append(mean)
        return x, jnp.stack(means)

    def scanned(params):
        return stack.apply(params, X, SHARED, each=EACH)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one_by_one(params), scanned(params)
    )
    loss = lambda f: jax.grad(lambda p: jnp.sum(f(p)[0] ** 2))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), loss(one_by_one), loss(scanned))


def test_parameters_are_stacked_under_the_paths_of_one_block_and_named():
    boxed = variables(Stack(Layer(), DEPTH))["params"]["dense"]
    assert boxed["kernel"].names == ("layers", "embed", "mlp")
    assert boxed["kernel"].value.shape == (DEPTH, 3, 3)
    kernels = boxed["kernel"].value
    assert not np.allclose(kernels[0], kernels[1]), "every layer is initialised by its own key"


@pytest.mark.parametrize("depth", [1, DEPTH])
def test_what_is_drawn_and_handed_on_in_one_pass_is_what_layers_draw_and_a_pass_hands_on(depth):
    stack, each = Stack(Layer(), depth), EACH[:depth]

    @jax.jit
    def made(key):
        once = stack.init_with_output(key, X, SHARED, each=each)
        cut = stack.init(key, X, SHARED, each=each, before={0: lambda x, train: x})
        return *once, cut, stack.apply(meta.unbox(once[1]), X, SHARED, each=each)

    out, drawn, cut, passed = made(jax.random.key(0))
    assert jax.tree.structure(drawn) == jax.tree.structure(cut)
    jax.tree.map(np.testing.assert_array_equal, drawn, cut)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out, passed)


def test_every_layer_drops_its_own_units():
    stack = Stack(Layer(), DEPTH)
    params = meta.unbox(variables(stack))
    same = jax.tree.map(lambda p: jnp.broadcast_to(p[:1], p.shape), params)

    def run(seed):
        return stack.apply(
            same, X, SHARED * 0, each=EACH * 0 + 1, train=True, rngs={"dropout": jax.random.key(seed)}
        )[0]

    assert not np.allclose(run(0), run(1))
    np.testing.assert_array_equal(run(0), run(0))


def test_an_unknown_policy_is_named():
    with pytest.raises(UsageError, match=r"remat is 'ful'\. Did you mean 'full'\?"):
        variables(Stack(Layer(), DEPTH, remat="ful"))


def test_remat_saves_memory():
    def residuals(remat):
        stack = Stack(Layer(), DEPTH, remat=remat)
        params = meta.unbox(variables(stack))
        grad = jax.jit(jax.grad(lambda p: jnp.sum(stack.apply(p, X, SHARED, each=EACH)[0] ** 2)))
        return grad.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert residuals("full") <= residuals("none")


class Counting(nn.Module):
    """Keeps a running mean of its input, and sows it."""

    @nn.compact
    def __call__(self, x, each, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        if train:
            mean.value = 0.5 * mean.value + 0.5 * x.mean(0)
        self.sow("intermediates", "seen", x)
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        return x * weight[None] - mean.value[None] + each, None


@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"unroll": 4}])
def test_other_variables_are_stacked_and_changed_layer_by_layer(options):
    stack = Stack(Counting(), DEPTH, **options)
    held = stack.init(jax.random.key(0), X, each=EACH)
    assert held["batch_stats"]["mean"].shape == (DEPTH, 3)
    np.testing.assert_array_equal(held["batch_stats"]["mean"], 0)  # making variables is no training step
    (y, _), changed = stack.apply(held, X, each=EACH, train=True, mutable=["batch_stats", "intermediates"])
    x, block = X, Counting()
    for i in range(DEPTH):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], held)
        np.testing.assert_allclose(changed["intermediates"]["seen"][0][i], x, rtol=1e-6)
        (x, _), one = block.apply(layer, x, EACH[i], train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(changed["batch_stats"]["mean"][i], one["batch_stats"]["mean"], rtol=1e-6)
    np.testing.assert_allclose(y, x, rtol=1e-6)
    after, _ = stack.apply({**held, **changed}, X, each=EACH)  # in evaluation what is kept is only read
    np.testing.assert_allclose(after, y, rtol=1e-6)


class Widen(nn.Module):
    """Twice as many channels as it gets."""

    @nn.compact
    def __call__(self, x, each, train=False):
        return each * Dense(2 * x.shape[-1], ("embed", "mlp"), name="dense")(x), jnp.mean(x)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_stack_of_one_may_change_the_shape(remat):
    stack = Stack(Widen(), 1, remat=remat)
    held = meta.unbox(stack.init(jax.random.key(0), X, each=jnp.array([3.0])))
    kernel = held["params"]["dense"]["kernel"]
    y, means = jax.jit(stack.apply)(held, X, each=jnp.array([3.0]))
    assert kernel.shape == (1, 3, 6)
    np.testing.assert_allclose(y, 3 * X @ kernel[0], atol=1e-5)
    np.testing.assert_allclose(means, jnp.mean(X)[None], atol=1e-6)


class Turning(nn.Module):
    """x <- x + point * Dense(x), and the point as its output."""

    @nn.compact
    def __call__(self, x, each, point=0.0, train=False):
        h = Dense(x.shape[-1], ("embed", "mlp"), name="dense")(x)
        self.sow("losses", "size", jnp.sum(h))
        return x + each * point * h, jnp.full((), point)


TURNS = (1.0, -0.5, 0.25)


@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"unroll": 2}])
@pytest.mark.parametrize("depth", [3, 7, 2])
def test_layers_in_turn_equal_their_blocks_one_after_another(options, depth):
    stack, each = Stack(Turning(), depth, **options), jnp.arange(1.0, depth + 1)
    params = meta.unbox(stack.init(jax.random.key(0), X, each=each))["params"]
    assert params["dense"]["kernel"].shape == (depth, 3, 3)

    def one_by_one(params):
        x = X
        for i in range(depth):
            layer = jax.tree.map(lambda p, i=i: p[i], params)
            x, _ = Turning().apply({"params": layer}, x, each[i], point=TURNS[i % 3])
        return x

    @jax.jit
    def in_turn(params):
        (x, points), sown = stack.apply({"params": params}, X, each=each, turns=TURNS, mutable=["losses"])
        return x, points, sown["losses"]["size"][0]

    x, points, sizes = in_turn(params)
    np.testing.assert_allclose(x, one_by_one(params), rtol=1e-5)
    np.testing.assert_array_equal(points, np.resize(TURNS, depth))
    assert sizes.shape == (depth,)
    slope = lambda f: jax.grad(lambda p: jnp.sum(f(p) ** 2))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
        slope(one_by_one),
        slope(lambda p: in_turn(p)[0]),
    )


def test_a_part_of_the_layers_keeps_their_turns():
    stack, each = Stack(Turning(), 7), jnp.ones(7)
    held = meta.unbox(stack.init(jax.random.key(0), X, each=each))
    run = jax.jit(
        lambda x, part: stack.apply(held, x, each=each, turns=TURNS, part=part)[0], static_argnums=1
    )
    np.testing.assert_allclose(run(run(X, (0, 2)), (2, 7)), run(X, (0, 7)), rtol=1e-6)


class Two(nn.Module):
    """x <- x + inner(scale x): a scale of one's own, and a layer that may be shared."""

    @nn.compact
    def __call__(self, x, each, train=False):
        scale = self.param("scale", nn.initializers.normal(1.0), (x.shape[-1],), jnp.float32)
        return x + Dense(x.shape[-1], ("embed", "mlp"), name="inner")(x * scale[None]), None


@pytest.mark.parametrize("options", [{}, {"remat": "full"}])
def test_what_is_shared_stands_once_and_gathers_the_gradients_of_all_layers(options):
    stack = Stack(Two(), DEPTH, shared=("inner/.*",), **options)
    boxed = stack.init(jax.random.key(0), X)["params"]
    assert boxed["inner"]["kernel"].names == ("embed", "mlp")
    assert meta.unbox(boxed)["inner"]["kernel"].shape == (3, 3)
    assert meta.unbox(boxed)["scale"].shape == (DEPTH, 3)
    params = meta.unbox(boxed)
    copied = {**params, "inner": jax.tree.map(lambda leaf: jnp.stack([leaf] * DEPTH), params["inner"])}
    apart = Stack(Two(), DEPTH, **options)

    def loss(stack, params):
        return jnp.sum(stack.apply({"params": params}, X)[0] ** 2)

    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(stack, p)))(params)
    same, each = jax.jit(jax.value_and_grad(lambda p: loss(apart, p)))(copied)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    np.testing.assert_allclose(gradient["scale"], each["scale"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.sum(0), rtol=1e-5, atol=1e-6),
        gradient["inner"],
        each["inner"],
    )


def test_all_may_be_shared_and_a_pattern_that_names_nothing_is_refused():
    loop = Stack(Two(), DEPTH, shared=(".*",))
    params = meta.unbox(loop.init(jax.random.key(0), X))
    assert params["params"]["scale"].shape == (3,)
    x = X
    for _ in range(DEPTH):
        x, _ = Two().apply(params, x, None)
    np.testing.assert_allclose(loop.apply(params, X)[0], x, rtol=1e-5)
    with pytest.raises(UsageError, match=r"'outer/.*' matches no parameter"):
        Stack(Two(), DEPTH, shared=("outer/.*",)).init(jax.random.key(0), X)


@pytest.mark.parametrize("shared", [(), ("dense/bias",)])
def test_layers_that_stand_apart_give_the_same(shared):
    stack = Stack(Layer(), DEPTH, shared=shared)
    params = meta.unbox(variables(stack))["params"]
    laid = stack.apart(params)
    assert isinstance(laid["dense"]["kernel"], Layers)
    assert isinstance(laid["dense"]["bias"], Layers) == (not shared)
    run = lambda params, each: stack.apply({"params": params}, X, SHARED, each=each)
    (x, means), (y, found) = run(params, EACH), run(laid, apart(EACH))
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(means, jnp.stack(found.each))
    scans = lambda params: str(jax.make_jaxpr(run)(params, EACH)).count("scan")
    assert (scans(params), scans(laid)) == (1, 0)
