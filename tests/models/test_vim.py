import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.vim import vim
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.layers.patches import PatchEmbed
from effjax.measure import count
from effjax.mixers import KINDS as MIXERS
from effjax.mixers import Mamba, VisionMamba
from effjax.mixers.context import Context
from effjax.models import KINDS
from tests.models import official

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow


def direction(theirs, suffix, ours):
    """The rows of one direction; the backward one's names end in `_b`."""
    log = "A_b_log" if suffix else "A_log"
    return (
        (f"{theirs}conv1d{suffix}.weight", f"{ours}conv_kernel", "i 1 w -> w i"),
        (f"{theirs}conv1d{suffix}.bias", f"{ours}conv_bias", ""),
        (f"{theirs}x_proj{suffix}.weight", f"{ours}select/kernel", "o i -> i o"),
        (f"{theirs}dt_proj{suffix}.weight", f"{ours}step_size/kernel", "o i -> i o"),
        (f"{theirs}dt_proj{suffix}.bias", f"{ours}step_size/bias", ""),
        (f"{theirs}{log}", f"{ours}A_log", ""),
        (f"{theirs}D{suffix}", f"{ours}D", ""),
    )


def projections(theirs, ours):
    return (
        (f"{theirs}in_proj.weight", (f"{ours}input/kernel", f"{ours}gate/kernel"), "o i -> i o"),
        (f"{theirs}out_proj.weight", f"{ours}output/kernel", "o i -> i o"),
    )


MIXER = "layers.{}.mixer."
ROWS = (
    ("patch_embed.proj.weight", "embed/projection/kernel", "o c p q -> (p q c) o"),
    ("patch_embed.proj.bias", "embed/projection/bias", ""),
    ("cls_token", "class_token", "1 n c -> n c"),
    ("pos_embed", "positions", "1 n c -> n c"),
    ("layers.{}.norm.weight", "blocks/mixer_norm/scale", ""),
    *projections(MIXER, "blocks/mixer/"),
    *direction(MIXER, "", "blocks/mixer/forward/"),
    *direction(MIXER, "_b", "blocks/mixer/backward/"),
    ("norm_f.weight", "norm/scale", ""),
    ("head.weight", "head/kernel", "o i -> i o"),
    ("head.bias", "head/bias", ""),
)


def test_equals_the_published_code_with_overlapping_patches_and_the_class_token_in_the_middle():
    tensors, pictures, expected = official.recording("vim")
    section = vim(16, 3, patch=4, stride=2, classes=5, state=4)
    model = build_kind(KINDS, section, "config.model")
    official.check(model, {"params": official.translated(tensors, ROWS)}, pictures, expected)


def test_one_direction_equals_the_mixer_of_transformers():
    """The other one is silent: without convolution and skip it has no input."""
    tensors, x, expected = official.recording("mamba_mixer")
    params = official.translated(tensors, projections("", "") + direction("", "", "forward/"))
    mamba = official.translated(tensors, projections("", "") + direction("", "", ""))
    x = jnp.asarray(x)
    np.testing.assert_allclose(
        jax.jit(Mamba(state=4).apply)({"params": mamba}, x, Context()), expected, rtol=1e-4, atol=1e-5
    )
    params["backward"] = {
        **params["forward"],
        **{name: jnp.zeros_like(params["forward"][name]) for name in ("conv_kernel", "conv_bias", "D")},
    }
    got = jax.jit(VisionMamba(state=4).apply)({"params": params}, x, Context())
    np.testing.assert_allclose(2 * got, expected, rtol=1e-4, atol=1e-5)


X = jax.random.normal(jax.random.key(0), (2, 9, 8))


def drawn(mixer):
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), X, Context()))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.4), shapes)["params"]


def test_reversed_tokens_and_swapped_directions_mirror_the_output():
    mixer = VisionMamba(state=3, chunk=4)
    params = drawn(mixer)
    swapped = {**params, "forward": params["backward"], "backward": params["forward"]}
    run = jax.jit(mixer.apply)
    straight, mirrored = (run({"params": p}, x, Context()) for p, x in ((params, X), (swapped, X[:, ::-1])))
    np.testing.assert_allclose(mirrored[:, ::-1], straight, rtol=1e-5, atol=1e-6)
    assert jnp.abs(run({"params": params}, X[:, ::-1], Context())[:, ::-1] - straight).max() > 1e-2


def test_every_token_sees_every_other():
    mixer = VisionMamba(state=3)
    params = drawn(mixer)
    sums = lambda x: mixer.apply({"params": params}, x[None], Context())[0].sum(-1)  # [N]
    moved = jax.jit(jax.jacrev(sums))(X[0])  # [N, N, C]
    assert (jnp.abs(moved).sum(-1) > 0).all()


def test_the_gradient_is_that_of_finite_differences():
    mixer = VisionMamba(state=3, chunk=4)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), drawn(mixer))
        along = jax.tree.map(
            lambda p: jnp.cos(jnp.arange(p.size, dtype=jnp.float64)).reshape(p.shape), params
        )
        x = X.astype(jnp.float64)

        @jax.jit
        def loss(shift):
            moved = jax.tree.map(lambda p, d: p + shift * d, params, along)
            return jnp.sum(jnp.sin(mixer.apply({"params": moved}, x, Context())))

        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(loss)(0.0), numeric, rtol=1e-6)


def test_memory_is_linear_in_the_number_of_tokens():
    """Attention at the same width is not."""

    def growth(mixer):
        def peak(tokens):
            x = jax.ShapeDtypeStruct((1, tokens, 32), jnp.float32)
            held = jax.eval_shape(mixer.init, jax.random.key(0), x, Context())
            return count(lambda v, x: mixer.apply(v, x, Context()), meta.unbox(held), x).peak_bytes

        sizes = [peak(n) for n in (196, 784, 3136)]
        return (sizes[2] - sizes[1]) / (sizes[1] - sizes[0])  # 4 where linear, 16 where quadratic

    assert growth(VisionMamba(state=4, chunk=49)) == pytest.approx(4, rel=0.02)
    attention = build_kind(MIXERS, dict(kind="attention", heads=8), "mixer")
    assert growth(attention) > 10


def test_overlapping_patches_are_a_strided_convolution():
    pictures = jax.random.normal(jax.random.key(1), (2, 10, 14, 3))
    embed = PatchEmbed(patch=4, dim=5, stride=2)
    held = meta.unbox(embed.init(jax.random.key(2), pictures))
    kernel = held["params"]["projection"]["kernel"].reshape(4, 4, 3, 5)
    expected = jax.lax.conv_general_dilated(
        pictures, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(embed.apply(held, pictures), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="patches of 4 x 4 pixels, 2 apart"):
        embed.apply(held, pictures[:, :9])


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UsageError, match="by their order alone"):
        VisionMamba().init(jax.random.key(0), X, Context(valid=jnp.ones((2, 9), bool)))
    with pytest.raises(UsageError, match="for a class token alone"):
        build_kind(KINDS, vim(16, 1, 2, 1, pool="mean"), "config.model")
    section = vim(16, 1, 2, 1)
    section["block"]["order"] = "parallel"
    with pytest.raises(UsageError, match="without an ffn has the order 'pre_norm'"):
        build_kind(KINDS, section, "config.model")
