"""E-MMDiT against its published code, which tests/parity/record_joint.py recorded, and what it promises."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.diffusion.e_mmdit import VARIANTS, get_config
from effjax import models
from effjax.config import build_kind
from effjax.diffusion.guidance import guided
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.models.e_mmdit import Compress, EMMDiT, Reconstruct
from effjax.train.tasks.auxiliary import LOSSES
from tests.models.blocks.test_joint import (
    LINEAR,
    attention_rows,
    ffn_rows,
    without_silent_text,
)
from tests.models.official import FOLDER, drawn_again, translated

CONV = "o i 1 1 -> i o"


def tiny(**changes):
    fields = dict(patch=1, dim=16, heads=2, depths=(1, 2, 1), patterns=((1, 1), (2, 2)), frequencies=8)
    return EMMDiT(**{**fields, **changes})


def inputs(batch=2, size=8, length=4):
    draw = np.random.default_rng(5)
    x, text = (draw.normal(size=(batch, *s)).astype(np.float32) for s in ((size, size, 3), (length, 6)))
    return jnp.asarray(x), jnp.linspace(1.0, 900.0, batch), jnp.asarray(text)


def shapes_of(model):
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs()))


def randomised(model):
    """Parameters with no zeros, so that every path counts."""
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * draw.normal(size=s.shape), s.dtype), shapes_of(model))


def rows():
    """Names of the published code, of its last block as `last.0`."""
    found = [
        ("pos_embed.proj.weight", "embed/projection/kernel", CONV),
        ("pos_embed.proj.bias", "embed/projection/bias", None),
        ("adaln_single.linear.weight", "modulation/projection/kernel", "(s c) i -> i s c"),
        ("adaln_single.linear.bias", "modulation/projection/bias", "(s c) -> s c"),
        *((f"adaln_single.emb.timestep_embedder.linear_{i}", f"time_embed/{own}", LINEAR)
          for i, own in ((1, "expand"), (2, "contract"))),
        ("context_embedder", "text_embed", LINEAR),
        ("proj_out", "output", LINEAR),
        *((f"tokenreconstructor.0.0.mergers.{i}", f"reconstruct/merge_{own}", LINEAR)
          for i, own in ((0, "expand"), (2, "contract"))),
    ]  # fmt: skip
    for r, sides in ((2, "p q"), (4, "u v")):
        unshuffled = f"o (c {sides}) 1 1 -> ({sides} c) o"
        found += [
            (f"tokencompressor.0.0.body{r}x.1", f"compress/path_{r}_expand/projection", unshuffled),
            (f"tokencompressor.0.0.body{r}x.3", f"compress/path_{r}_contract", CONV),
            (f"tokenreconstructor.0.0.body{r}x.1", f"reconstruct/path_{r}_expand", CONV),
            (f"tokenreconstructor.0.0.body{r}x.3", f"reconstruct/path_{r}_contract", CONV),
        ]
    for theirs, ours in (*((f"block_groups.{i}.{{}}", f"blocks_{i}") for i in range(3)), ("last.{}", "last")):
        streams = (("", "image"),) if ours == "last" else (("", "image"), ("_c", "text"))
        for ending, stream in streams:
            for leaf in ("scale", "bias"):
                found.append((f"{theirs}.scale_shift_{leaf}{ending}", f"{ours}/{stream}_affine/{leaf}", None))
            found += ffn_rows(f"{theirs}.ff{'_context' if ending else ''}", f"{ours}/{stream}_ffn")
        for ending, stream in (("", "image"), ("_context", "text")):
            for leaf, own in (("weight", "scale"), ("bias", "bias")):
                found.append((f"{theirs}.norm1{ending}.{leaf}", f"{ours}/{stream}_norm/{own}", None))
        attention = attention_rows(f"{theirs}.attn", f"{ours}/mixer")
        heard = [
            row for row in attention if not row[1].startswith(("last/mixer/text/query", "last/mixer/text_"))
        ]
        found += heard
    whole = []
    for theirs, ours, layout in found:
        if theirs.endswith((".weight", ".bias")) or "scale_shift" in theirs:
            whole.append((theirs, ours, layout))
        else:
            whole += [
                (f"{theirs}.weight", f"{ours}/kernel", layout),
                (f"{theirs}.bias", f"{ours}/bias", None),
            ]
    return whole


@pytest.mark.slow
def test_it_is_the_published_network():
    with np.load(FOLDER / "e_mmdit.npz") as data:
        held = dict(data)
    tensors = {
        name.replace("block_groups.2.3.", "last.0."): tensor
        for name, tensor in drawn_again(held["__shapes"]).items()
    }
    tensors = without_silent_text(tensors, "last.0.")
    model = EMMDiT(patch=1, dim=32, heads=2)
    variables = {"params": translated(tensors, rows(), h=2, s=6, p=2, q=2, u=4, v=4)}
    given = tuple(jnp.asarray(held[name]) for name in ("x", "times", "text"))
    wanted = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *given))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, wanted)
    ours = jax.jit(model.apply)(variables, *given)
    assert np.abs(np.asarray(ours) - held["out"]).max() <= 1e-4 * np.abs(held["out"]).max()


def built(variant):
    return build_kind(models.KINDS, get_config(variant).model, "config.model")


@pytest.mark.slow
def test_parameters_are_those_of_the_published_code_and_modulation_is_a_hundredth_of_adaln_zero():
    shapes = jax.eval_shape(
        built("512").init,
        jax.random.key(0),
        jnp.zeros((1, 16, 16, 32)),
        jnp.zeros(1),
        jnp.zeros((1, 128, 2048)),
    )["params"]

    def count(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    # The published code has 302,449,952, with queries of the text in its last block and their norm.
    assert count(shapes) == 302_449_952 - (768 * 768 + 768 + 32)
    groups = {name: tree for name, tree in shapes.items() if name.startswith("blocks") or name == "last"}
    affine = sum(count(tree[key]) for tree in groups.values() for key in tree if key.endswith("affine"))
    shared = count(shapes["modulation"])
    assert affine == 12 * 768 * (24 + 23)
    assert shared == 6 * 768 * 769
    assert affine + shared < 0.025 * 47 * 6 * 768 * 769  # against a matrix for every stream of every block


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resolves(variant):
    experiment = resolve(get_config(variant))
    model, task = experiment.model, experiment.task
    batch = {name: jnp.asarray(value) for name, value in experiment.data.described().example_batch(2).items()}
    out = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), batch["image"], jnp.zeros(2), batch["text"])[0]
    )
    assert out.shape == batch["image"].shape
    assert task.condition == "text"


@pytest.mark.slow
def test_patterns_and_the_way_depth_is_run_have_no_part_in_the_parameters():
    model = tiny()
    held = randomised(model)
    out = jax.jit(model.apply)(held, *inputs())
    remade = jax.jit(model.clone(remat="full").apply)(held, *inputs())
    np.testing.assert_allclose(remade, out, rtol=1e-4, atol=1e-5)
    full = model.clone(patterns=((1, 1),)), model.clone(patterns=((1, 1), (1, 2)), text_in_regions="shared")
    assert shapes_of(full[0]) == shapes_of(full[1]) == shapes_of(model)
    one, two = (jax.jit(m.apply)(held, *inputs()) for m in full)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert np.abs(one - out).max() > 1e-3


class Both:
    """Compression and reconstruction with weights that pick and place."""

    LARGE = 20.0  # where gelu is the identity

    def __init__(self, ratio, dim=16, size=4):
        self.ratio, self.dim, self.size = ratio, dim, size

    def run(self, take, x):
        """`take [ratio, ratio, dim, dim]` is what becomes of every place of a neighbourhood."""
        eye, large = np.eye(self.dim), np.full(self.dim, self.LARGE)
        contract = dict(kernel=eye, bias=-large)
        name, live = f"path_{self.ratio}", self.dim // self.ratio**2
        projection = dict(kernel=take.reshape(-1, self.dim), bias=large)
        compress = {f"{name}_expand": dict(projection=projection), f"{name}_contract": contract}
        spread = dict(kernel=np.eye(live, self.dim), bias=large)
        coarse_alone = dict(kernel=np.concatenate([eye, 0 * eye]), bias=large)
        reconstruct = {
            f"{name}_expand": spread,
            f"{name}_contract": contract,
            "merge_expand": coarse_alone,
            "merge_contract": contract,
        }
        ratios = (self.ratio,)
        coarse = Compress(ratios).apply({"params": compress}, x)
        assert coarse.shape == (1, (self.size // self.ratio) ** 2, self.dim)
        return Reconstruct(ratios).apply({"params": reconstruct}, coarse, x).reshape(x.shape)


@pytest.mark.parametrize("ratio", [2, 4])
def test_compression_is_undone_by_reconstruction_with_matched_weights(ratio):
    both = Both(ratio)
    live, draw = both.dim // ratio**2, np.random.default_rng(0)
    x = np.zeros((1, 4, 4, both.dim), np.float32)
    x[..., :live] = draw.normal(size=(1, 4, 4, live))
    # Channel c of place (i, j) goes where PyTorch's pixel shuffle looks for it.
    take = np.zeros((ratio, ratio, both.dim, both.dim))
    for i in range(ratio):
        for j in range(ratio):
            for c in range(live):
                take[i, j, c, (c * ratio + i) * ratio + j] = 1.0
    np.testing.assert_allclose(both.run(take, jnp.asarray(x)), x, atol=1e-5)
    # The mean of a neighbourhood, spread over its places: the identity where the picture is constant in each.
    flat = x[:, ::ratio, ::ratio].repeat(ratio, 1).repeat(ratio, 2)
    mean = np.broadcast_to(take.sum((0, 1)) / ratio**2, take.shape)
    np.testing.assert_allclose(both.run(mean, jnp.asarray(flat)), flat, atol=1e-5)
    assert np.abs(both.run(mean, jnp.asarray(x)) - x).max() > 0.1


def test_positions_are_centred_and_as_far_apart_on_every_grid():
    model = tiny()
    small, large = model._positions(8, 8), model._positions(16, 16)
    np.testing.assert_array_equal(small, large.reshape(16, 16, -1)[4:12, 4:12].reshape(64, -1))
    # The first channel is the sine of the column, which begins at (96 - 8) / 2 sixths.
    np.testing.assert_allclose(small[:8, 0], np.sin((44 + np.arange(8)) / 6), rtol=1e-6)


@pytest.mark.slow
def test_no_text_is_zeros_in_training_and_in_guidance():
    experiment = resolve(get_config("smoke"))
    task = experiment.task
    draw = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(draw.normal(size=(400, 8, 8, 1)), jnp.float32),
        "text": jnp.asarray(draw.normal(size=(400, 4, 10)), jnp.float32),
    }
    text = task.prepare(batch, jax.random.key(0))["text"]
    dropped = ~np.asarray(text).any((1, 2))
    assert 0.05 < dropped.mean() < 0.16
    np.testing.assert_array_equal(text[~dropped], batch["text"][~dropped])

    few = {name: value[:3] for name, value in batch.items()}
    shapes = meta.unbox(jax.eval_shape(task.init, jax.random.key(0), few))
    assert LOSSES not in shapes
    held = jax.tree.map(lambda s: jnp.asarray(0.2 * draw.normal(size=s.shape), s.dtype), shapes)
    denoiser = task.denoiser(held)
    t = jnp.linspace(0.1, 0.9, 3)

    @jax.jit
    def predict(scale, text):
        return guided(denoiser, scale, task.null).predict(few["image"], t, text, None)[0]

    plain = jax.jit(lambda text: denoiser.predict(few["image"], t, text, None)[0])
    with_text, without = plain(few["text"]), plain(jnp.zeros_like(few["text"]))
    assert np.abs(with_text - without).max() > 1e-3
    np.testing.assert_allclose(predict(0.0, few["text"]), without, atol=1e-5)
    np.testing.assert_allclose(predict(3.0, few["text"]), 3 * with_text - 2 * without, atol=1e-4)


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_are_those_of_finite_differences():
    model, target = tiny(), jnp.asarray(np.random.default_rng(3).normal(size=(2, 8, 8, 3)), jnp.float32)
    held = randomised(model)

    @jax.jit
    @jax.value_and_grad
    def loss(held):
        return jnp.sum(target * model.apply(held, *inputs(), train=True))

    _, gradient = loss(held)
    silent = [jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(gradient) if not jnp.any(g)]
    assert silent == []
    size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    step = 3e-2 / size
    ahead, behind = (
        loss(jax.tree.map(lambda p, g, s=sign: p + s * step * g / size, held, gradient))[0]
        for sign in (1, -1)
    )
    np.testing.assert_allclose((ahead - behind) / (2 * step), size, rtol=2e-2)


@pytest.mark.slow
def test_bfloat16_stays_near_float32_and_examples_do_not_touch():
    model = tiny()
    held = jax.tree.map(lambda p: p.astype(jnp.bfloat16), randomised(model))
    run = jax.jit(model.apply)
    full = run(jax.tree.map(lambda p: p.astype(jnp.float32), held), *inputs())
    x, t, text = inputs()
    low = run(held, x.astype(jnp.bfloat16), t, text)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), full, atol=3e-2 * float(jnp.abs(full).max()))
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), held)
    other = run(wide, x.at[0].set(0.0), t, text.at[0].set(0.0))
    np.testing.assert_allclose(other[1], full[1], atol=1e-5)


def refused(model, *given):
    with pytest.raises(UsageError) as caught:
        jax.eval_shape(model.init, jax.random.key(0), *given)
    return str(caught.value)


def test_bad_input():
    x, t, text = inputs()
    assert "8 x 6 has no neighbourhoods of 4 x 4 patches of 1" in refused(tiny(), x[:, :, :6], t, text)
    assert "3 tokens of the text make no 2 regions" in refused(tiny(), x, t, text[:, :3])
    assert "20 tokens of the picture" in refused(tiny(patterns=((1, 1), (4, 4))), x, t, text)
    for changes, message in (
        (dict(dim=24), "dim=24 must be a multiple of 16"),
        (dict(depths=(1, 0, 1)), r"depths=\(1, 0, 1\)"),
        (dict(patterns=()), r"patterns=\(\)"),
    ):
        with pytest.raises(UsageError, match=message):
            tiny(**changes)
