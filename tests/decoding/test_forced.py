import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.decoding.forced import forced
from effjax.decoding.policies.window import Window
from effjax.errors import UsageError
from tests.decoding.policies.common import toy, variables


@pytest.mark.parametrize("first", [1, 5, 9])
def test_without_a_policy_it_is_the_pass_over_whole_sequences(draw, first):
    tokens, targets = (jnp.asarray(draw.integers(0, 17, (2, 9))) for _ in range(2))
    said = forced(toy(), variables(), tokens, targets, first)
    logits = jax.jit(toy().apply)(variables(), tokens)[:, first - 1 :]
    log_p = np.take_along_axis(jax.nn.log_softmax(logits), np.asarray(targets)[:, first - 1 :, None], 2)
    np.testing.assert_allclose(said.log_p, log_p[:, :, 0], atol=1e-5)
    np.testing.assert_array_equal(said.likeliest, np.argmax(logits, axis=-1))
    assert said.caches.positions.tolist() == [[list(range(9))] * 2] * 2


def test_a_policy_comes_into_play(draw):
    tokens = jnp.asarray(draw.integers(0, 17, (2, 9)))
    plain = forced(toy(), variables(), tokens, tokens, 5)
    model = toy(cache=Window(budget=5, sinks=1))
    said = forced(model, variables(), tokens, tokens, 5)
    assert said.caches.keys.shape[2] == 5
    np.testing.assert_allclose(said.log_p[:, 0], plain.log_p[:, 0], atol=1e-5)  # five tokens fit
    assert np.all(np.abs(said.log_p[:, 1:] - plain.log_p[:, 1:]) > 1e-6)
    apart = forced(model, model.layers_apart(variables()), tokens, tokens, 5)
    np.testing.assert_allclose(apart.log_p, said.log_p, atol=1e-6)


@pytest.mark.parametrize("first", [0, 10])
def test_a_prompt_of_no_length_that_can_be(draw, first):
    tokens = jnp.asarray(draw.integers(0, 17, (2, 9)))
    with pytest.raises(UsageError, match=f"first={first} must be between 1 and the 9"):
        forced(toy(), variables(), tokens, tokens, first)
