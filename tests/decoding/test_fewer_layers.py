import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.fewer_layers import fewer_layers
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.layers.stack import is_apart
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock, Layer

TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def build(draw, **options):
    block = DecoderBlock(Attention(2, rotary_base=100.0, causal=True), Gated(12))
    model = LM(block, vocab=11, dim=8, depth=4, **options)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return model, jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


def logits(model, variables):
    return jax.jit(model.apply)(variables, TOKENS)


def silenced(variables, layers):
    """Layers whose branches add nothing are not there."""
    params = variables["params"]
    blocks = {**params["blocks"]}
    for branch, last in (("mixer", "output"), ("ffn", "contract")):
        held = jax.tree.map(lambda leaf: leaf.at[jnp.array(layers)].set(0.0), blocks[branch][last])
        blocks[branch] = {**blocks[branch], last: held}
    return {**variables, "params": {**params, "blocks": blocks}}


@pytest.mark.parametrize(
    "options", [{}, {"layers": (Layer(window=2, rotary_base=10.0), Layer(), Layer(rotary_base=50.0))}]
)
def test_what_is_left_out_is_as_if_it_added_nothing(draw, options):
    model, variables = build(draw, **options)
    expected = logits(model, silenced(variables, [0, 2]))
    assert not np.allclose(expected, logits(model, variables), atol=1e-2)
    few, cut = fewer_layers(model, variables, (1, 3))
    assert few.depth == 2
    np.testing.assert_allclose(logits(few, cut), expected, rtol=1e-5, atol=1e-5)
    few, cut = fewer_layers(model, model.layers_apart(variables), [1, 3])
    assert is_apart(cut)
    np.testing.assert_allclose(logits(few, cut), expected, rtol=1e-5, atol=1e-5)


def test_all_layers_are_the_model(draw):
    model, variables = build(draw)
    few, cut = fewer_layers(model, variables, range(4))
    assert few == model
    jax.tree.map(np.testing.assert_array_equal, cut, variables)


def test_layers_apart_are_not_copied_and_stay_on_their_own(draw):
    model, variables = build(draw)
    whole = model.layers_apart(variables)
    _, cut = fewer_layers(model, whole, [2])
    assert (
        cut["params"]["blocks"]["mixer"]["query"]["kernel"][0]
        is (whole["params"]["blocks"]["mixer"]["query"]["kernel"][2])
    )


def test_what_layers_share_stays(draw):
    model, variables = build(draw, shared=("ffn/.*",))
    few, cut = fewer_layers(model, variables, [0, 3])
    held, left = variables["params"]["blocks"], cut["params"]["blocks"]
    jax.tree.map(np.testing.assert_array_equal, left["ffn"], held["ffn"])
    np.testing.assert_array_equal(
        left["mixer"]["key"]["kernel"], held["mixer"]["key"]["kernel"][np.array([0, 3])]
    )
    assert logits(few, cut).shape == (2, 6, 11)


def test_other_collections_are_cut_too(draw):
    model, variables = build(draw)
    variables = {**variables, "statistics": {"blocks": {"mean": jnp.arange(4.0)}, "norm": jnp.ones(2)}}
    _, cut = fewer_layers(model, variables, [1, 2])
    np.testing.assert_array_equal(cut["statistics"]["blocks"]["mean"], [1.0, 2.0])
    np.testing.assert_array_equal(cut["statistics"]["norm"], [1.0, 1.0])


def test_norms_scaled_by_depth_allow_the_first_layers(draw):
    model, variables = build(draw, norm_scaling=True)
    few, cut = fewer_layers(model, variables, [0, 1])
    np.testing.assert_allclose(
        logits(few, cut), logits(model, silenced(variables, [2, 3])), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(UsageError, match="keep the first layers, or fold"):
        fewer_layers(model, variables, [0, 2])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "no layer is kept"),
        ([0, 4], "layer 4 is not there: the model has the layers 0 to 3"),
        ([-1], "layer -1 is not there"),
        ([2, 1], "layers 2, 1: name each once, in rising order"),
        ([1, 1], "layers 1, 1: name each once"),
    ],
)
def test_bad_requests_are_named(draw, kept, message):
    with pytest.raises(UsageError, match=message):
        fewer_layers(*build(draw), kept)
