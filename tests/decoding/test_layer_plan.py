"""Plans said beforehand: what runs, how often, and with which cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.generate import generate, left_pad
from effjax.decoding.layer_plan import early_exit, keeping, order_of, planned, repeating, skipping
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.layers.stack import layer_of
from effjax.mixers import Attention
from effjax.mixers.context import Context
from effjax.models.lm import LM, DecoderBlock, Layer

TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def language_model(**fields):
    mixer = Attention(2, kv_heads=1, rotary_base=100.0, causal=True)
    return LM(DecoderBlock(mixer, Gated(24)), vocab=19, dim=16, depth=3, **fields)


def drawn(model):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), TOKENS))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def variables(model):
    return drawn(model)


def by_hand(model, variables, plan):
    """Blocks one after the other between the embedding and the head."""
    params, own = variables["params"], model.own()
    block = jax.jit(model.block.clone(parent=None, name=None).apply)
    x = params["embedding"][TOKENS]
    for layer in order_of(plan):
        each = None, layer_of(own, layer)
        x, _ = block({"params": layer_of(params["blocks"], layer)}, x, each, Context())
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + model.block.epsilon)
    return (x * params["norm"]["scale"][None, None]) @ params["head"].T


def logits(model, variables):
    return jax.jit(model.apply)(variables, TOKENS)


def test_plans_by_name():
    assert skipping(4, [1, 3]) == (1, 0, 1, 0)
    assert keeping(4, [0, 2]) == (1, 0, 1, 0)
    assert repeating(4, {2}) == (1, 1, 2, 1)
    assert early_exit(4, 3) == (1, 1, 1, 0)
    assert order_of((1, 2, 0, 1)) == (0, 1, 1, 3)


def test_a_plan_that_executes_all_is_the_model(model, variables):
    same, kept = planned(model, variables, (1, 1, 1))
    assert same == model
    jax.tree.map(np.testing.assert_array_equal, kept, variables)
    np.testing.assert_array_equal(logits(same, kept), logits(model, variables))


@pytest.mark.parametrize("plan", [(1, 0, 1), (0, 2, 1), (1, 1, 0), (3, 0, 0)])
def test_a_plan_is_its_blocks_one_after_the_other(model, variables, plan):
    shorter, kept = planned(model, variables, plan)
    assert shorter.depth == sum(plan)
    np.testing.assert_allclose(logits(shorter, kept), by_hand(model, variables, plan), rtol=1e-4, atol=1e-4)


def test_layers_that_differ_keep_their_kind():
    model = language_model(layers=(Layer(window=2), Layer(window=4)))
    variables = drawn(model)
    shorter, kept = planned(model, variables, (0, 1, 2))
    assert shorter.layers == (Layer(window=4), Layer(window=2), Layer(window=2))
    np.testing.assert_allclose(
        logits(shorter, kept), by_hand(model, variables, (0, 1, 2)), rtol=1e-4, atol=1e-4
    )


def test_parameters_that_all_layers_share_stay(draw):
    model = language_model(shared=("ffn/.*",))
    variables = drawn(model)
    _, kept = planned(model, variables, (1, 0, 1))
    blocks, before = kept["params"]["blocks"], variables["params"]["blocks"]
    jax.tree.map(np.testing.assert_array_equal, blocks["ffn"], before["ffn"])
    assert blocks["mixer"]["query"]["kernel"].shape[0] == 2


def test_other_collections_are_cut_too(model, variables):
    more = {**variables, "statistics": {"blocks": {"mean": jnp.arange(3.0)}, "norm": jnp.ones(2)}}
    _, kept = planned(model, more, (0, 1, 2))
    np.testing.assert_array_equal(kept["statistics"]["blocks"]["mean"], [1.0, 2.0, 2.0])
    np.testing.assert_array_equal(kept["statistics"]["norm"], [1.0, 1.0])


def test_norms_scaled_by_depth_allow_the_first_blocks():
    model = language_model(norm_scaling=True)
    variables = drawn(model)
    first, kept = planned(model, variables, early_exit(3, 2))
    silent = jax.tree.map(lambda leaf: leaf.at[2].set(0.0), variables["params"]["blocks"])
    params = {**variables["params"], "blocks": silent}
    np.testing.assert_allclose(logits(first, kept), logits(model, {"params": params}), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apart", [False, True])
def test_a_plan_writes_what_it_computes(model, variables, apart):
    """Step by step, so with a cache for each time that a block runs, as with the whole text at once."""
    shorter, kept = planned(model, model.layers_apart(variables) if apart else variables, (1, 0, 2))
    if apart:
        query = kept["params"]["blocks"]["mixer"]["query"]["kernel"].each
        assert query[1] is query[2]  # no copy
    rows, lengths = left_pad([[3, 1, 4, 1]])
    greedy = Sampling(temperature=0.0)
    written = generate(shorter, kept, rows, lengths, 3, jax.random.key(0), greedy)[0].tolist()
    whole, stacked = planned(model, variables, (1, 0, 2))
    text, run = [3, 1, 4, 1], jax.jit(whole.apply)
    for _ in range(3):
        padded = jnp.array([text + [0] * (7 - len(text))])
        text.append(int(jnp.argmax(run(stacked, padded)[0, len(text) - 1])))
    assert written == text[4:]


def test_bad_plans_are_named(model, variables):
    for plan in [(1, 1), (1, -1, 1)]:
        with pytest.raises(UsageError, match="give a count of 0 or more for each of 3 blocks"):
            planned(model, variables, plan)
    with pytest.raises(UsageError, match="keep at least one"):
        planned(model, variables, (0, 0, 0))
    with pytest.raises(UsageError, match="keep the first blocks, or fold the factors"):
        planned(model.clone(norm_scaling=True), variables, (1, 0, 1))
    with pytest.raises(UsageError, match="layer 3 is not there: the model has the layers 0 to 2"):
        skipping(3, [3])
    with pytest.raises(UsageError, match="layer -1 is not there"):
        repeating(3, [-1])
    with pytest.raises(UsageError, match="choose from 1 to 3"):
        early_exit(3, 0)
