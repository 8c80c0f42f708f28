"""LEGO against the published code's numbers, and what bricks promise: locality, skipping, larger pictures."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion import lego_diffusion
from effjax import models
from effjax.config import build_kind
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.samplers import DDIMSampler
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.measure import count
from effjax.measure.analytic import bricks as closed
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models import lego as room
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.blocks.switch_dit import SwitchDiTBlock
from effjax.models.dit import DiT
from effjax.models.lego import Brick, Lego
from effjax.train.tasks.diffusion import Diffusion
from tests.models.official import FOLDER, translated

PARTS = dict(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
BLOCK = DiTBlock(**PARTS)
GROWING = (Brick(2, 1, 1), Brick(4, 2, 1), Brick(8, 2, 1))


def tiny(bricks=GROWING, **changes):
    return Lego(**{"dim": 8, "bricks": bricks, "classes": 3, "block": BLOCK, "frequencies": 6, **changes})


def inputs(batch=2, height=8, width=8, channels=1):
    x = np.random.default_rng(5).normal(size=(batch, height, width, channels)).astype(np.float32)
    return jnp.asarray(x), jnp.linspace(1.0, 900.0, batch), jnp.arange(batch) % 4


def drawn(model, *args, spread=0.3):
    """Parameters with no zeros, so that every path counts."""
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(spread * draw.normal(size=s.shape), s.dtype), shapes)


def run(model, params, *args, **options):
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a, **options))(params, *args)


def with_runs(model, *runs):
    """The same network, whose bricks run at these times."""
    changed = (dataclasses.replace(brick, runs=when) for brick, when in zip(model.bricks, runs, strict=True))
    return model.clone(bricks=tuple(changed))


def rows(number):
    """Their names and ours of one brick."""
    theirs, ours = f"model.{number}.", f"bricks_{number}/"
    block, mine = f"{theirs}blocks.{{}}.", f"{ours}blocks/"
    split = tuple(f"{mine}mixer/{name}/" for name in ("query", "key", "value"))
    return (
        (f"{theirs}x_embedder.proj.weight", f"{ours}embed/projection/kernel", "o i p q -> (p q i) o"),
        (f"{theirs}x_embedder.proj.bias", f"{ours}embed/projection/bias", None),
        (
            f"{block}attn.qkv.weight",
            tuple(f"{path}kernel" for path in split),
            "(heads size) i -> i heads size",
        ),
        (f"{block}attn.qkv.bias", tuple(f"{path}bias" for path in split), "(heads size) -> heads size"),
        (f"{block}attn.proj.weight", f"{mine}mixer/output/kernel", "o (heads size) -> heads size o"),
        (f"{block}attn.proj.bias", f"{mine}mixer/output/bias", None),
        (f"{block}mlp.fc1.weight", f"{mine}ffn/expand/kernel", "o i -> i o"),
        (f"{block}mlp.fc1.bias", f"{mine}ffn/expand/bias", None),
        (f"{block}mlp.fc2.weight", f"{mine}ffn/contract/kernel", "o i -> i o"),
        (f"{block}mlp.fc2.bias", f"{mine}ffn/contract/bias", None),
        (f"{block}adaLN_modulation.1.weight", f"{mine}modulation/projection/kernel", "(six o) i -> i six o"),
        (f"{block}adaLN_modulation.1.bias", f"{mine}modulation/projection/bias", "(six o) -> six o"),
        (
            f"{theirs}final_layer.adaLN_modulation.1.weight",
            f"{ours}modulation/projection/kernel",
            "(two o) i -> i two o",
        ),
        (
            f"{theirs}final_layer.adaLN_modulation.1.bias",
            f"{ours}modulation/projection/bias",
            "(two o) -> two o",
        ),
        (f"{theirs}final_layer.linear.weight", f"{ours}output/kernel", "o i -> i o"),
        (f"{theirs}final_layer.linear.bias", f"{ours}output/bias", None),
    )


SHARED = (
    ("t_embedder.mlp.0.weight", "time_embed/expand/kernel", "o i -> i o"),
    ("t_embedder.mlp.0.bias", "time_embed/expand/bias", None),
    ("t_embedder.mlp.2.weight", "time_embed/contract/kernel", "o i -> i o"),
    ("t_embedder.mlp.2.bias", "time_embed/contract/bias", None),
    ("label_table", "label_embed/embedding", None),
)


def test_every_brick_predicts_what_the_published_code_does():
    """A toy of three growing bricks, with labels and without."""
    with np.load(FOLDER / "lego.npz") as data:
        tensors = dict(data)
    x, t, outs = (tensors.pop(f"__{name}") for name in ("x", "t", "out"))
    matrix, bias = (tensors.pop(f"y_embedder.embedding_table.{leaf}") for leaf in ("weight", "bias"))
    tensors["label_table"] = np.concatenate([matrix.T + bias, bias[None]])
    sizes = (Brick(2, 1, 2), Brick(4, 2, 1), Brick(8, 2, 1))
    model = tiny(sizes, dim=16, classes=4, frequencies=256)
    params = translated(tensors, (*SHARED, *rows(0), *rows(1), *rows(2)), heads=2, six=6, two=2)
    args = jnp.asarray(x), jnp.asarray(t), jnp.array([1, 3, 4])
    wanted = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)

    last, sown = run(model, params, *args, train=True, mutable=["predictions"])
    for (ours, where), theirs in zip(sown["predictions"]["bricks"], outs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
        assert where.all()
    np.testing.assert_array_equal(last, ours)
    np.testing.assert_allclose(run(model, params, *args), outs[-1], rtol=1e-4, atol=1e-4 * np.abs(outs).max())


def test_one_brick_as_large_as_the_picture_is_a_dit():
    """On a picture that is told its coordinates."""
    x, t, label = inputs(channels=2)
    model = tiny((Brick(8, 2, 2),))
    params = drawn(model, x, t, label)
    told = jnp.concatenate([x, room._coordinates(x)], axis=-1)
    dit = DiT(block=BLOCK, patch=2, dim=8, depth=2, classes=3, frequencies=6, learned_sigma=False)
    # The DiT predicts all four channels of which the brick has two: give it their rows, and zeros.
    of_dit = {name: params[name] for name in ("time_embed", "label_embed")} | params["bricks_0"]
    output = params["bricks_0"]["output"]

    def widened(leaf):
        split = leaf.reshape(*leaf.shape[:-1], 4, 2)
        return jnp.concatenate([split, jnp.zeros_like(split)], axis=-1).reshape(*leaf.shape[:-1], 16)

    of_dit["output"] = jax.tree.map(widened, output)
    theirs = run(dit, of_dit, told, t, label)
    np.testing.assert_allclose(run(model, params, x, t, label), theirs[..., :2], rtol=1e-5, atol=1e-5)


def one_brick(model, params, number, estimate, seen, c):
    """What one brick makes of an estimate."""
    return model.apply({"params": params}, number, estimate, seen, c, method="brick")


def test_squares_of_a_local_brick_do_not_see_each_other():
    """The Jacobian between them is exactly zero, and within them nowhere."""
    model, (x, t, label) = tiny(), inputs(batch=1)
    params = drawn(model, x, t, label)
    seen, c = jnp.concatenate([x, room._coordinates(x)], axis=-1), jnp.ones((1, 8))

    @jax.jit
    def jacobian(seen):
        return jax.jacobian(lambda s: one_brick(model, params, 1, x, s, c)[0, :, :, 0])(seen)[
            :, :, 0, :, :, 0
        ]

    across = np.asarray(jacobian(seen))  # [H, W, H, W]
    square = np.arange(64).reshape(8, 8) // 32 * 2 + np.arange(8)[None] // 4  # of each pixel
    same = square.reshape(8, 8, 1, 1) == square.reshape(1, 1, 8, 8)
    np.testing.assert_array_equal(across[~same], 0.0)
    assert np.all(across[same] != 0)


def test_a_local_brick_does_the_same_on_larger_pictures_and_moves_with_its_squares():
    model, (x, t, label) = tiny(), inputs(batch=1)
    params, c = drawn(model, x, t, label), jnp.ones((1, 8))
    draw = np.random.default_rng(2)
    estimate, seen = (jnp.asarray(draw.normal(size=(1, 12, 16, n)), jnp.float32) for n in (1, 3))
    brick = jax.jit(lambda e, s: one_brick(model, params, 1, e, s, c))
    whole = brick(estimate, seen)
    for row, column in ((0, 0), (4, 8), (8, 12)):
        at = np.s_[:, row : row + 4, column : column + 4]
        np.testing.assert_allclose(brick(estimate[at], seen[at]), whole[at], rtol=1e-5, atol=1e-6)
    rolled = brick(*(jnp.roll(a, (4, 8), axis=(1, 2)) for a in (estimate, seen)))
    np.testing.assert_allclose(rolled, jnp.roll(whole, (4, 8), axis=(1, 2)), rtol=1e-5, atol=1e-6)


def test_larger_pictures_are_drawn_with_the_same_parameters():
    model = tiny()
    params = drawn(model, *inputs())
    wide = run(model, params, *inputs(height=16, width=24))
    assert wide.shape == (2, 16, 24, 1)
    assert np.all(np.isfinite(wide))


def test_a_brick_left_out_passes_on_what_it_was_given():
    """Each of three: the rest of the network on the estimate before it, and x_t before the first."""
    model, (x, t, label) = tiny(), inputs()
    params = drawn(model, x, t, label)
    c, _ = run(model, params, t, label, method=lambda m, *a: m.conditioned(*a, jnp.float32))
    seen = jnp.concatenate([x, room._coordinates(x)], axis=-1)

    def rest(params, without):
        estimate = x
        for number in range(3):
            estimate = estimate if number == without else one_brick(model, params, number, estimate, seen, c)
        return estimate

    for out in range(3):
        ours = run(with_runs(model, *(number != out for number in range(3))), params, x, t, label)
        np.testing.assert_allclose(ours, jax.jit(rest, static_argnums=1)(params, out), rtol=1e-5, atol=1e-6)


def test_times_decide_picture_by_picture():
    """A brick that runs from 500 on: those before are as without it, those behind as with it."""
    model, (x, t, label) = tiny(), inputs(batch=3)
    params = drawn(model, x, t, label)
    times = jnp.array([499.0, 500.0, 900.0])
    some = run(with_runs(model, (500.0, 1000.0), True, True), params, x, times, label)
    without, whole = (run(with_runs(model, on, True, True), params, x, times, label) for on in (False, True))
    np.testing.assert_allclose(some[0], without[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(some[1:], whole[1:], rtol=1e-5, atol=1e-6)
    assert np.abs(without - whole).min(axis=(1, 2, 3)).max() > 1e-4


def test_bricks_that_do_not_run_are_not_computed():
    """In the program as compiled: what a step costs where the condition does not hold."""
    model, (x, t, label) = tiny(), inputs(batch=1)
    params = drawn(model, x, t, label)
    sometimes = with_runs(model, True, True, (0.0, 400.0))
    apply = lambda p, *a: sometimes.apply({"params": p}, *a)
    off = count(apply, params, x, t, label, branches=((".*", 0),)).macs
    on = count(apply, params, x, t, label, branches=((".*", 1),)).macs
    assert on == closed.macs(sometimes, 8, 8, 1, t=300.0)
    assert off == closed.macs(sometimes, 8, 8, 1, t=500.0) < 0.8 * on


@pytest.mark.parametrize("variant", lego_diffusion.VARIANTS[:3])
def test_the_closed_form_is_what_is_counted(variant):
    model = build_kind(models.KINDS, lego_diffusion.get_config(variant).model, "config.model")
    args = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((1, 8, 8, 1), jnp.float32), ((1,), jnp.float32), ((1,), jnp.int32))
    ]
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    cost = count(lambda p, *a: model.apply({"params": p}, *a), shapes, *args)
    assert closed.parameters(model, 1) == cost.parameters
    assert closed.macs(model, 8, 8, 1) == cost.macs


def test_a_sampling_run_costs_less_where_bricks_are_left_out():
    """Ten guided steps, in closed form and counted one by one, each as a program of the bricks that run."""
    process, sampler = DDPM(sigma="large"), DDIMSampler(10)
    times = np.asarray(process.network_time(jnp.asarray(sampler.plan(process)["t"]))).tolist()
    model = with_runs(tiny(), (0.0, 600.0), True, (300.0, 1000.0))
    args = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((2, 8, 8, 1), jnp.float32), ((2,), jnp.float32), ((2,), jnp.int32))
    ]
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    counted = 0
    for t in times:
        fixed = with_runs(model, *(brick.at(t) for brick in model.bricks))
        counted += count(lambda p, *a: fixed.apply({"params": p}, *a), shapes, *args).macs  # noqa: B023
    assert closed.sampling_macs(model, times, 8, 8, 1, guided=True) == counted
    assert counted < 0.8 * closed.sampling_macs(tiny(), times, 8, 8, 1, guided=True)


@pytest.mark.parametrize(
    ("variant", "theirs"),
    [
        ("s-pg-64", 33_738_456),
        ("s-u-32", 61_377_584),
        ("l-pr-32", 463_008_032),
        ("l-pg-64", 500_570_328),
        ("xl-pg-32", 729_048_096),
        ("xl-u-32", 1_261_373_744),
    ],
)
def test_parameters_are_those_of_the_published_code(variant, theirs):
    """Counted from it, without the fixed tables of positions."""
    config = lego_diffusion.get_config(variant)
    model = build_kind(models.KINDS, config.model, "config.model")
    shape = config.data.expected.fields.image.shape
    init = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, int)
    )
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(init)) == theirs
    assert closed.parameters(model, shape[-1]) == theirs


SHARES = (Brick(2, 1, 1, share=0.25), Brick(4, 2, 1, share=0.5), Brick(8, 2, 1))


def test_training_on_some_squares_computes_them_as_training_on_all():
    """As many of each picture as its share, other ones for each; the rest is passed on."""
    model, (x, t, label) = tiny(SHARES), inputs()
    params = drawn(model, x, t, label)
    options = dict(train=True, mutable=["predictions"], rngs={"dropout": jax.random.key(3)})
    _, sown = run(model, params, x, t, label, **options)
    (first, where), (_, half), (_, whole) = sown["predictions"]["bricks"]
    _, told = run(tiny(), params, x, t, label, train=True, mutable=["predictions"])
    all_of_first = told["predictions"]["bricks"][0][0]
    np.testing.assert_allclose(first, jnp.where(where, all_of_first, x), rtol=1e-5, atol=1e-6)
    assert [float(w.mean()) for w in (where, half, whole)] == [0.25, 0.5, 1.0]
    assert np.any(where[0] != where[1])
    flags = np.asarray(where).reshape(2, 4, 2, 4, 2)
    assert np.all(flags == flags[:, :, :1, :, :1])  # whole squares

    small, large = (
        count(lambda p, *a, m=m: m.apply({"params": p}, *a, **options), params, x, t, label).macs
        for m in (model, tiny())
    )
    assert small < large
    evaluated = [run(m, params, x, t, label) for m in (model, tiny())]
    np.testing.assert_array_equal(*evaluated)


def loss_of(model, key=None):
    task = Diffusion(model=model, process=DDPM(sigma="large", prediction="v"))
    batch = {"image": inputs()[0], "label": jnp.arange(2), "mask": jnp.ones(2)}
    params, key = drawn(model, *inputs()), jax.random.key(0)
    prepared = task.prepare(batch, key)

    @jax.jit
    def losses(params):
        def loss(params):
            means, _ = task.loss({"params": params}, prepared, key)
            return means["loss"].value(), means

        return jax.grad(loss, has_aux=True)(params)

    grads, means = losses(params)
    return task, prepared, params, grads, {name: float(mean.value()) for name, mean in means.items()}


def test_every_brick_is_trained_to_predict():
    """The loss is the mean of all bricks' errors; with the last alone it is that one's."""
    task, prepared, params, _, means = loss_of(tiny())
    args = (
        task.process.noise(prepared["image"], prepared["noise"], prepared["time"]),
        task.process.network_time(prepared["time"]),
        prepared["label"],
    )
    _, sown = run(tiny(), params, *args, train=True, mutable=["predictions"])
    target = task.process.target(prepared["image"], prepared["noise"], prepared["time"])
    errors = [float(jnp.mean((out - target) ** 2)) for out, _ in sown["predictions"]["bricks"]]
    assert means["loss"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert means["mse"] == pytest.approx(errors[-1], rel=1e-4)
    *_, alone = loss_of(tiny(joint=False))
    assert alone["loss"] == pytest.approx(errors[-1], rel=1e-4)


def test_squares_that_were_not_computed_do_not_count():
    """The mean over squares that were, whichever they are: finite, and no reward for leaving some out."""
    task, prepared, params, grads, means = loss_of(tiny((SHARES[0],)))
    args = (
        task.process.noise(prepared["image"], prepared["noise"], prepared["time"]),
        task.process.network_time(prepared["time"]),
        prepared["label"],
    )
    options = dict(train=True, mutable=["predictions"], rngs={"dropout": jax.random.key(0)})
    _, sown = run(task.model, params, *args, **options)
    ((out, where),) = sown["predictions"]["bricks"]
    target = task.process.target(prepared["image"], prepared["noise"], prepared["time"])
    errors = np.asarray((out - target) ** 2)[np.asarray(where)]
    assert errors.size == 2 * 16
    assert means["loss"] == pytest.approx(errors.mean(), rel=1e-4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_a_mixer_apart_mixes_runs_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 8)), jnp.float32)
    apart, mixer = room.Apart(Attention(heads=2), 4), Attention(heads=2)
    params = drawn(apart, x, Context())
    assert set(params) == {"query", "key", "value", "output"}
    got = run(apart, params, x, Context())
    pieces = [run(mixer, params, x[:, i : i + 4], Context()) for i in (0, 4, 8)]
    np.testing.assert_allclose(got, jnp.concatenate(pieces, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sampling_leaves_bricks_out_in_its_own_steps():
    """Guided steps of a model that leaves bricks out are those of plain bricks where all run."""
    model = tiny()
    params = drawn(model, *inputs(), spread=0.1)
    label, keys = jnp.array([0, 2]), example_keys(jax.random.key(1), jnp.arange(2))

    def draw(model):
        task = Diffusion(model=model, process=DDPM(sigma="large"))
        sampling = Sampling(DDIMSampler(4), 2.0)
        made = jax.jit(lambda p: sample_classes(task, {"params": p}, label, (8, 8, 1), sampling, keys))
        return made(params)

    plain, never, always = (
        draw(m)
        for m in (
            model,
            with_runs(model, True, True, (0.0, 500.0)),
            with_runs(model, True, True, (0.0, 1000.0)),
        )
    )
    np.testing.assert_allclose(plain, always, rtol=1e-4, atol=1e-4)
    assert np.abs(plain - never).max() > 1e-3


def test_bfloat16_is_close():
    model = tiny()
    params = drawn(model, *inputs())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x, t, label = inputs()
    wide, narrow = run(model, params, x, t, label), run(model, half, x.astype(jnp.bfloat16), t, label)
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(np.float32(narrow) - wide).max() < 0.06 * np.abs(wide).max()


def test_wrong_requests():
    with pytest.raises(UsageError, match="size=4 of a brick must be a multiple of its patch=3"):
        Brick(4, 3, 1)
    with pytest.raises(UsageError, match="share=0 of the squares must be above 0"):
        Brick(4, 2, 1, share=0.0)
    with pytest.raises(UsageError, match="from a time to one that is not before it"):
        Brick(4, 2, 1, runs=(5.0, 1.0))
    with pytest.raises(UsageError, match="cannot be cut into patches of 8 x 8"):
        jax.eval_shape(tiny().init, jax.random.key(0), *inputs(height=12))
    with pytest.raises(UsageError, match="a LEGO needs at least one brick"):
        jax.eval_shape(tiny(()).init, jax.random.key(0), *inputs())
    with pytest.raises(UsageError, match="SwitchDiTBlock is routed by a DiT"):
        jax.eval_shape(tiny(block=SwitchDiTBlock(**PARTS)).init, jax.random.key(0), *inputs())
