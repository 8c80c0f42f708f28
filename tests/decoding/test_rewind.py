import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.cache import EMPTY, append, init_cache, visible
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.window import Window
from effjax.decoding.prefill import left_pad, prefill
from effjax.decoding.rewind import check_rewinds, rewind
from effjax.decoding.storage.quantised import Quantised
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.layers.stack import Layers, apart
from effjax.mixers import Attention, Mamba
from effjax.models.lm import LM, DecoderBlock

MODEL = LM(DecoderBlock(Attention(2, rotary_base=100.0, causal=True), Gated(12)), vocab=11, dim=8, depth=2)


def drawn(model, draw):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


def stacked(cache):
    """Two layers of it."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache)


def layer(cache):
    return jax.tree.map(lambda leaf: leaf[1], cache, is_leaf=lambda leaf: isinstance(leaf, Layers))


@pytest.mark.parametrize("laid", [stacked, lambda cache: apart(stacked(cache))])
def test_each_sequence_takes_back_its_own(laid):
    numbers = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None], (2, 4, 1, 4))
    cache = append(init_cache(2, 6, 1, 4), numbers, numbers, jnp.array([[0, 1, 2, 3], [-1, 0, 1, 2]]))
    cache = layer(rewind(laid(cache), jnp.array([2, 9])))
    np.testing.assert_array_equal(cache.written, [2, 4])
    np.testing.assert_array_equal(
        cache.positions, [[0, 1, -1, -1, EMPTY, EMPTY], [-1, 0, 1, 2, EMPTY, EMPTY]]
    )
    # What was taken back is not seen, not even by what comes later.
    np.testing.assert_array_equal(
        visible(cache.positions, jnp.array([[5], [5]]))[0, 0, 0], [1, 1, 0, 0, 0, 0]
    )
    new = jnp.full((2, 2, 1, 4), 7.0)
    cache = append(cache, new, new, jnp.array([[2, 3], [3, -1]]))
    np.testing.assert_array_equal(cache.positions, [[0, 1, 2, 3, EMPTY, EMPTY], [-1, 0, 1, 2, 3, -1]])
    np.testing.assert_array_equal(cache.keys[0, :, 0, 0], [0, 1, 7, 7, 0, 0])
    np.testing.assert_array_equal(cache.written, [4, 5])


@pytest.mark.parametrize("laid", [lambda variables: variables, MODEL.layers_apart])
def test_going_on_after_a_rewind_equals_a_fresh_start(draw, laid):
    variables = laid(drawn(MODEL, draw))
    step = jax.jit(lambda *given: MODEL.apply(variables, *given, method="step"))
    prompts, lengths = left_pad([[3, 1, 4, 1], [5, 9]])
    at = prefill(MODEL, variables, prompts, lengths, 10)
    caches = rewind(at.caches, at.positions)

    wrong = jnp.array([[1, 7, 8, 6], [9, 2, 3, 4]])
    _, caches = step(wrong, caches, at.positions[:, None] + jnp.arange(4)[None])
    caches = rewind(caches, jnp.array([5, 3]))  # one token of each stays
    following = jnp.array([[2, 10], [0, 6]])
    logits, _ = step(following, caches, jnp.array([[5, 6], [3, 4]]))

    rows, lengths = left_pad([[3, 1, 4, 1, 7, 0], [5, 9, 2, 0]])
    fresh = prefill(MODEL, variables, rows, lengths, 10)
    expected, _ = step(following, fresh.caches, jnp.array([[5, 6], [3, 4]]))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_recurrent_state_has_no_way_back():
    check_rewinds(MODEL)
    recurrent = LM(DecoderBlock(Mamba(state=4), None), vocab=11, dim=8, depth=2)
    with pytest.raises(UsageError, match=r"tokens cannot be taken back .* needs attention in all layers"):
        check_rewinds(recurrent)


def test_slots_that_were_given_away_do_not_come_back():
    check_rewinds(MODEL.clone(cache=Policy()))
    with pytest.raises(UsageError, match="cache=Window gives slots away"):
        check_rewinds(MODEL.clone(cache=Window(budget=8)))
    with pytest.raises(UsageError, match="does not give a refused token's slot back"):
        check_rewinds(MODEL.clone(cache=Policy(storage=Quantised(group=4))))
