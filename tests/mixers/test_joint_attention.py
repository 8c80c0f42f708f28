"""Joint attention against attention with a mask, and what alternating regions reach."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.joint_attention import JointAttention, Pattern

IMAGE, TEXT, WIDTH, HEADS = 16, 8, 8, 2
RUNS = Pattern(2, 1), Pattern(2, 4), Pattern(4, 2)


def inputs(seed=0):
    draw = np.random.default_rng(seed)
    return tuple(jnp.asarray(draw.normal(size=(2, n, WIDTH)), jnp.float32) for n in (IMAGE, TEXT))


def shapes_of(mixer):
    made = jax.eval_shape(lambda *a: mixer.init(jax.random.key(0), *a, Pattern()), *inputs())
    return meta.unbox(made)


def randomised(mixer):
    shapes = shapes_of(mixer)
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(0.5 * draw.normal(size=s.shape), s.dtype), shapes)


def region(pattern, n):
    return (np.arange(n) // pattern.run) % pattern.regions


def allowed(pattern, text):
    """Who meets whom `[n + l, n + l]`, by the definition."""
    image = region(pattern, IMAGE)
    of = np.concatenate([image, region(pattern, TEXT) if text == "split" else np.full(TEXT, -1)])
    everybody = (of[:, None] == -1) | (of[None, :] == -1) if text == "shared" else False
    return (of[:, None] == of[None, :]) | everybody


def by_mask(params, image, text, mask):
    """The equation in float64 over all tokens at once, with a mask."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])

    def projected(name):
        rows = []
        for stream, x in (("image", image), ("text", text)):
            layer = p[stream][name]
            rows.append(np.einsum("bnc,chd->bhnd", np.asarray(x, np.float64), layer["kernel"]))
            rows[-1] = rows[-1] + layer["bias"][:, None]
            if f"{name}_norm" in p[stream]:
                size = np.sqrt(np.mean(rows[-1] ** 2, axis=-1, keepdims=True) + 1e-6)
                rows[-1] = rows[-1] / size * p[stream][f"{name}_norm"]["scale"]
        return np.concatenate(rows, axis=2)

    q, k, v = map(projected, ("query", "key", "value"))
    weights = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])) * mask
    y = (weights / weights.sum(-1, keepdims=True)) @ v  # [b, h, n + l, d]
    outs = []
    for stream, part in (("image", y[:, :, :IMAGE]), ("text", y[:, :, IMAGE:])):
        layer = p[f"{stream}_output"]
        outs.append(np.einsum("bhnd,hdc->bnc", part, layer["kernel"]) + layer["bias"])
    return outs


@pytest.mark.parametrize("pattern", [Pattern(), *RUNS])
@pytest.mark.parametrize("text", ["split", "shared"])
def test_regions_are_attention_with_a_mask(pattern, text):
    mixer = JointAttention(HEADS, text_in_regions=text)
    params = randomised(mixer)
    got = jax.jit(mixer.apply, static_argnums=3)(params, *inputs(), pattern)
    for ours, theirs in zip(got, by_mask(params, *inputs(), allowed(pattern, text)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_one_region_is_full_joint_attention_however_text_is_told():
    mixers = [JointAttention(HEADS, text_in_regions=text) for text in ("split", "shared")]
    params = randomised(mixers[0])
    one, other = (jax.jit(m.apply, static_argnums=3)(params, *inputs(), Pattern(1, 4)) for m in mixers)
    full = by_mask(params, *inputs(), np.ones((IMAGE + TEXT, IMAGE + TEXT)))
    for a, b, c in zip(one, other, full, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=2e-5)


@pytest.mark.parametrize("text", ["split", "shared"])
def test_without_an_answer_the_picture_gets_the_same(text):
    whole = JointAttention(HEADS, text_in_regions=text)
    deaf = whole.clone(answers_text=False)
    params = randomised(whole)["params"]
    image = {"image": params["image"], "image_output": params["image_output"]}
    kept = {name: leaf for name, leaf in params["text"].items() if not name.startswith("query")}
    held = {"params": image | {"text": kept}}
    assert jax.tree.map(jnp.shape, held) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(deaf))
    ours, none = deaf.apply(held, *inputs(), RUNS[0])
    assert none is None
    np.testing.assert_allclose(ours, whole.apply({"params": params}, *inputs(), RUNS[0])[0], atol=1e-6)


# 64 + 16 tokens of a compressed 512 pixel picture, and 128 of text, as published.
@pytest.mark.parametrize(("image", "text"), [(80, 128), (256, 128)])
def test_two_alternating_patterns_reach_every_pair_in_two_layers(image, text):
    def met(pattern):
        of = np.concatenate([region(pattern, image), region(pattern, text)])
        return of[:, None] == of[None, :]

    first, second = met(Pattern(4, 1)), met(Pattern(4, 4))
    for one, two in itertools.permutations((first, second)):
        assert np.all(one.astype(int) @ two)
    for alone in (first, second):
        assert not np.all(alone.astype(int) @ alone)  # without the turn no distance is enough


def test_the_gradient_sees_what_the_layer_does():
    mixer, pattern = JointAttention(HEADS), RUNS[1]
    params, target = randomised(mixer), inputs(seed=2)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        out = mixer.apply(params, *inputs(), pattern)
        return sum(jnp.sum(t * o) for t, o in zip(target, out, strict=True))

    _, gradient = loss(params)
    draw = np.random.default_rng(5)
    direction = jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), p.dtype), params)
    step = 1e-3
    ahead, behind = (
        loss(jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction))[0] for sign in (1, -1)
    )
    slope = sum(jnp.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-2)
    silent = [jax.tree_util.keystr(p) for p, g in jax.tree.leaves_with_path(gradient) if not jnp.any(g)]
    assert silent == []


def test_bad_input():
    with pytest.raises(UsageError, match="16 tokens of the picture make no 3 regions"):
        JointAttention(HEADS).init(jax.random.key(0), *inputs(), Pattern(3, 1))
    with pytest.raises(UsageError, match=r"8 tokens of the text .* a multiple of 16"):
        JointAttention(HEADS).init(jax.random.key(0), *inputs(), Pattern(4, 4))
    with pytest.raises(UsageError, match="heads=3 does not divide the width 8"):
        JointAttention(3).init(jax.random.key(0), *inputs(), Pattern())
    with pytest.raises(UsageError, match="regions=0"):
        Pattern(0)
