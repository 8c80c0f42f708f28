"""Grafting: what is new, what is inherited, and that the first stage teaches it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from configs.diffusion import grafting as configs
from effjax import models
from effjax.compress.grafting import (
    Seen,
    graft,
    grafted,
    halved,
    inherited,
    locality,
    regressions,
    replaced,
    watch,
)
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.measure import count
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.hyena import Hyena
from effjax.mixers.sliding_window import SlidingWindow
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.dit import DiT

ALL = dict(mixer="l1", ffn="l2", block="l1")


def dit(depth=4, **changes):
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(hidden=12))
    return DiT(**(dict(block=block, patch=2, dim=8, depth=depth, classes=3, frequencies=6) | changes))


def inputs(batch=2):
    x = np.random.default_rng(5).normal(size=(batch, 8, 8, 1))
    return jnp.float32(x), jnp.linspace(1.0, 900.0, batch), jnp.arange(batch) % 4


def randomised(model, seed=9):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs()))["params"]
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def run(model, params):
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a))(params, *inputs())


def taught(student, blocks, teacher, params, new):
    @jax.jit
    def compare(blocks, params):
        return regressions(student, blocks, new, watch(teacher, {"params": params}, *inputs()), ALL)

    return compare(blocks, params)


def seen_by(teacher, params):
    """What `watch` says, compiled; the grid is no array."""
    seen = jax.jit(lambda p: watch(teacher, {"params": p}, *inputs())._replace(grid=()))(params)
    return seen._replace(grid=(4, 4))


def test_patterns_keep_the_first_layers_of_each():
    half = grafted(dit(), mixer=Hyena(), every=2, kept=1)
    kinds = [type(member.mixer) for member in half.block.members]
    assert (kinds, half.depth) == ([Attention, Hyena], 2)
    assert replaced(half, dit()) == (frozenset(), {"mixer"})
    most = grafted(dit(), ffn=MLP(hidden=6), every=4, kept=1)
    assert replaced(most, dit()) == (frozenset(), {"ffn"}, {"ffn"}, {"ffn"})
    assert replaced(dit(), dit(), ("mixer",)) == ({"mixer"},)
    whole = grafted(dit(), mixer=Hyena())
    assert (whole.depth, type(whole.block.mixer)) == (4, Hyena)


def test_members_share_no_parameters():
    student = grafted(dit(), mixer=Hyena(), every=4, kept=2)
    params = randomised(student)["blocks"]
    assert set(params) == {f"members_{i}" for i in range(4)}
    assert all("ffn" in tree and "mixer" in tree for tree in params.values())


def test_a_graft_of_the_same_operators_is_the_teacher_exactly():
    params = randomised(dit())
    student = grafted(dit(), mixer=Attention(heads=2), every=2, kept=1)
    held = graft(student, dit(), params, randomised(student, seed=3))
    np.testing.assert_allclose(run(student, held), run(dit(), params), rtol=1e-5, atol=1e-5)
    found = taught(student, held["blocks"], dit(), params, replaced(student, dit(), ("mixer", "ffn")))
    assert set(found) == {"mixer", "ffn"}
    for distance, error in found.values():
        np.testing.assert_allclose(distance, 0, atol=1e-5)
        np.testing.assert_allclose(error, 0, atol=1e-9)


def test_a_window_over_all_tokens_keeps_the_pictures():
    params = randomised(dit())
    student = grafted(dit(), mixer=SlidingWindow(2, radius=15), every=2, kept=1)
    blocks = inherited(student, dit(), params)["blocks"]
    assert "mixer" not in blocks["members_1"]
    blocks["members_1"]["mixer"] = jax.tree.map(lambda leaf: leaf[1::2], params["blocks"]["mixer"])
    np.testing.assert_allclose(
        run(student, {**params, "blocks": blocks}), run(dit(), params), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_what_a_new_operator_is_told_are_the_inputs_of_its_own_layer():
    params, student = randomised(dit()), grafted(dit(), mixer=Hyena(), every=2, kept=1)
    held = graft(student, dit(), params, randomised(student, seed=3))
    seen = seen_by(dit(), params)
    found = taught(student, held["blocks"], dit(), params, replaced(student, dit()))
    h, y = seen.operators["mixer"]
    apart = []
    for repeat, layer in enumerate((1, 3)):
        own = jax.tree.map(lambda leaf: leaf[repeat], held["blocks"]["members_1"]["mixer"])  # noqa: B023
        apart.append(np.abs(Hyena().apply({"params": own}, h[layer], Context()) - y[layer]))
    np.testing.assert_allclose(found["mixer"][0], np.mean(apart, axis=(0, 2, 3)), rtol=1e-5)
    # The same network with cycles as its teacher says the same of every layer.
    cycled = grafted(dit(), mixer=Attention(heads=2), every=2, kept=1)
    again = seen_by(cycled, inherited(cycled, dit(), params))
    for name in ("mixer", "ffn"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            again.operators[name],
            seen.operators[name],
        )


def test_a_graft_of_a_graft_takes_its_layers_one_by_one():
    first = grafted(dit(), mixer=Hyena(), every=2, kept=1)
    params = randomised(first)
    second = first.clone(
        block=first.block.clone(members=tuple(m.clone(ffn=MLP(hidden=6)) for m in first.block.members))
    )
    assert replaced(second, first) == ({"ffn"}, {"ffn"})
    blocks = inherited(second, first, params)["blocks"]
    for name in ("members_0", "members_1"):
        jax.tree.map(np.testing.assert_array_equal, blocks[name]["mixer"], params["blocks"][name]["mixer"])
        assert "ffn" not in blocks[name]


@pytest.mark.slow
def test_blocks_side_by_side_begin_with_the_teachers_weights():
    params, student = randomised(dit()), halved(dit())
    held = graft(
        student, dit(), params, meta.unbox(jax.jit(student.init)(jax.random.key(0), *inputs()))["params"]
    )
    kernel = held["blocks"]["members_1"]["ffn"]["expand"]["kernel"]
    np.testing.assert_array_equal(kernel, params["blocks"]["ffn"]["expand"]["kernel"][1::2])
    found = taught(student, held["blocks"], dit(), params, replaced(student, dit()))
    assert set(found) == {"block"}
    # A pair of which the second adds nothing is the first alone, and so is the teacher's pair.
    silent = jax.tree.map(lambda leaf: leaf.at[1::2].set(0), params["blocks"]["modulation"])
    still = {**params, "blocks": {**params["blocks"], "modulation": silent}}
    blocks = graft(student, dit(), still, held)["blocks"]
    distance, _ = taught(student, blocks, dit(), still, ())["block"]
    np.testing.assert_allclose(distance, 0, atol=1e-6)


@pytest.mark.slow
def test_the_first_stage_brings_a_graft_near_its_teacher():
    params, student = randomised(dit(2)), dit(2)
    new = replaced(student, student, ("mixer",))
    blocks = {**params["blocks"], "mixer": randomised(dit(2), seed=3)["blocks"]["mixer"]}
    seen = jax.jit(lambda: watch(student, {"params": params}, *inputs(32))._replace(grid=()))()
    seen = seen._replace(grid=(4, 4))
    optimizer = optax.adam(5e-3)

    def error(mixer, distance="l1"):
        found = regressions(student, {**blocks, "mixer": mixer}, new, seen, ALL | dict(mixer=distance))
        return jnp.mean(found["mixer"][0])

    @jax.jit
    def train(mixer):
        def step(carry, _):
            mixer, state = carry
            value, slope = jax.value_and_grad(error)(mixer)
            moves, state = optimizer.update(slope, state)
            return (optax.apply_updates(mixer, moves), state), value

        return jax.lax.scan(step, (mixer, optimizer.init(mixer)), None, length=800)

    (mixer, _), values = train(blocks["mixer"])
    assert values[-1] < 0.05 * values[0]
    before, after = (
        np.abs(run(student, {**params, "blocks": {**blocks, "mixer": m}}) - run(student, params)).mean()
        for m in (blocks["mixer"], mixer)
    )
    assert after < 0.2 * before


def test_distances_are_those_of_their_names():
    y, g = jnp.zeros((1, 1, 1, 2)), jnp.asarray([[[[0.5, 3.0]]]])
    student = dit(1, dim=2, block=DiTBlock(mixer=Attention(heads=1), ffn=MLP(hidden=1)))
    blocks = {"ffn": {"expand": {"kernel": jnp.zeros((1, 2, 1)), "bias": jnp.zeros((1, 1))}}}
    blocks["ffn"]["contract"] = {"kernel": jnp.zeros((1, 1, 2)), "bias": g[0, 0]}
    seen = Seen({"ffn": (y, y + 1e-9)}, [], jnp.zeros((1, 2)), (1, 1))
    for name, wanted in (("l1", 1.75), ("l2", 4.625), ("huber", (0.125 + 2.5) / 2)):
        found = regressions(student, blocks, (frozenset({"ffn"}),), seen, ALL | dict(ffn=name))
        np.testing.assert_allclose(found["ffn"][0], [wanted], rtol=1e-5)


# Table 4: the change of the operators' parameters, and of the work of softmax and gates, in percent.
MHA, FFN = 28 * 4 * (1152**2 + 1152), 28 * (2 * 1152 * 4608 + 4608 + 1152)
TABLE = {
    "hyena-se-50": (MHA, 0.22), "hyena-se-75": (MHA, 0.33),
    "hyena-x-50": (MHA, 0.16), "hyena-x-75": (MHA, 0.24),
    "hyena-y-50": (MHA, 0.05), "hyena-y-75": (MHA, 0.08),
    "swa-50": (MHA, 0.0), "swa-75": (MHA, 0.0),
    "mlp3-50": (FFN, -12.5), "mlp3-75": (FFN, -18.75), "mlp3-100": (FFN, -25.0),
    "mlp6-50": (FFN, 25.0), "mlp6-75": (FFN, 37.5), "mlp6-100": (FFN, 50.0),
    "conv-50": (FFN, 0.02), "conv-75": (FFN, 0.03),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_parameters_change_as_in_the_papers_table(name):
    model = build_kind(models.KINDS, configs.get_config(f"xl2-{name}").model, "config.model")
    latents = jnp.zeros((1, 32, 32, 4))
    shapes = jax.eval_shape(model.init, jax.random.key(0), latents, jnp.zeros(1), jnp.zeros(1, int))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    whole, percent = TABLE[name]
    assert 100 * (size - 674_834_720) / whole == pytest.approx(percent, abs=0.006)


def test_the_locality_of_attention_is_its_share_within_the_band():
    n = 6
    even = jnp.full((2, n, n), 1 / n)
    near = sum(abs(i - j) <= 1 for i in range(n) for j in range(n))
    np.testing.assert_allclose(locality(even, 1), near / n**2, rtol=1e-6)
    np.testing.assert_allclose(locality(jnp.eye(n)[None], 0), 1, rtol=1e-6)
    np.testing.assert_allclose(locality(even, n), 1, rtol=1e-6)


def test_a_window_does_the_share_of_attention_that_lies_in_it():
    x = jnp.zeros((1, 256, 32))

    def pairs(mixer):
        held = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
        macs = count(lambda p, x: mixer.apply(p, x, Context()), held, x).macs
        return macs - 4 * 256 * 32 * 32

    # Tiles of 16 queries see 24 keys, where the table counts 9.
    assert pairs(SlidingWindow(2, 4)) / pairs(Attention(heads=2)) == pytest.approx(24 / 256, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grafted(dit(), mixer=Hyena(), every=3, kept=1), "make no graft of 4 layers"),
        (lambda: grafted(dit()), "no operators"),
        (lambda: halved(dit(3)), "depth=3 is odd"),
        (lambda: replaced(dit(2), dit(4)), "has 2 layers and its teacher 4"),
        (
            lambda: replaced(grafted(dit(4), mixer=Hyena(), every=2, kept=1), dit(4, condition="per_block")),
            "set condition='shared'",
        ),
        (
            lambda: replaced(dit(4), grafted(dit(4), mixer=Hyena(), every=2, kept=1)),
            "new in some of its layers only",
        ),
    ],
)
def test_grafts_that_do_not_fit(make, message):
    with pytest.raises(UsageError, match=message):
        make()
