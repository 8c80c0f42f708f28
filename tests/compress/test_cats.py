"""CATS on language models: calibration, what it costs in perplexity, and decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.compress.cats import Thresholding, calibrate, histogram, left_out, quantile, thresholded
from effjax.compress.rows import by_rows
from effjax.errors import UsageError
from effjax.ffn import MLP, Gated
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock
from effjax.train.tasks.language import cross_entropy

VOCAB, WIDTH, HIDDEN = 32, 32, 96
TOKENS = jax.random.randint(jax.random.key(0), (4, 64), 0, VOCAB)


def small(ffn=None, depth=3):
    mixer = Attention(2, qkv_bias=False, out_bias=False, rotary_base=1e4, causal=True)
    return LM(DecoderBlock(mixer, ffn or Gated(HIDDEN)), vocab=VOCAB, dim=WIDTH, depth=depth, tied=True)


@functools.cache
def variables():
    return meta.unbox(jax.jit(small().init)(jax.random.key(1), TOKENS))


def gates(model, held, tokens):
    """|silu(x W_gate)| of every layer, from the inputs of the perceptrons."""
    apply = functools.partial(model.apply, mutable=["magnitudes"])
    _, told = jax.jit(apply)(held, tokens)
    (bits,) = told["magnitudes"]["blocks"]["ffn"]["sizes"]
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_measured_sparsity_on_held_out_data_is_what_was_asked_for(sparsity):
    thresholds = calibrate(small(), variables(), [{"tokens": TOKENS[:2]}, {"tokens": TOKENS[2:]}], sparsity)
    model, held = thresholded(small(), variables(), thresholds)
    new = jax.random.randint(jax.random.key(2), (16, 64), 0, VOCAB)
    share = np.mean(gates(model, held, new) < thresholds[:, None, None, None], axis=(1, 2, 3))
    # Neurons of a token are not independent; four standard errors of as many draws as calibration tokens.
    error = 4 * np.sqrt(sparsity * (1 - sparsity) / TOKENS.size)
    np.testing.assert_allclose(share, sparsity, atol=error)
    assert len(set(thresholds)) == 3  # each layer has its own
    np.testing.assert_allclose(left_out(model, held, [{"tokens": new}]), share, atol=1e-2)


def test_thresholds_are_quantiles_to_the_width_of_a_bin():
    model, held = thresholded(small(), variables(), np.zeros(3, np.float32))
    sizes = gates(model, held, TOKENS)
    for k in (0.25, 0.9):
        np.testing.assert_allclose(
            calibrate(small(), variables(), [{"tokens": TOKENS}], k),
            np.quantile(sizes.reshape(3, -1), k, axis=1),
            rtol=2**-6,
        )
    assert calibrate(small(), variables(), [{"tokens": TOKENS}], 0.0).tolist() == [0.0] * 3


def test_quantile_of_a_known_histogram():
    counts = np.zeros(2**15, np.int64)
    counts[0x3F80] = 30  # 1 to 1 + 2^-7
    counts[0x4000] = 10  # 2 to 2 + 2^-6
    assert quantile(counts, 0.375) == pytest.approx(1 + 2**-8)
    assert quantile(counts, 0.875) == pytest.approx(2 + 2**-7)


def test_padding_is_not_counted():
    segments = jnp.concatenate([jnp.ones((4, 40), int), jnp.zeros((4, 24), int)], 1)
    watched = thresholded(small(), variables(), np.zeros(3, np.float32))
    counts = histogram(*watched, [{"tokens": TOKENS, "segments": segments}])
    assert counts.sum(1).tolist() == [4 * 40 * HIDDEN] * 3


def test_as_one_choice_it_is_both_steps():
    batches = [{"tokens": TOKENS}]
    model, held = Thresholding(0.5).applied(small(), variables(), batches)
    by_steps = thresholded(small(), variables(), calibrate(small(), variables(), batches, 0.5))
    assert model == by_steps[0]
    np.testing.assert_array_equal(*(jax.tree.leaves(v["thresholds"]) for v in (held, by_steps[1])))
    assert left_out(*Thresholding(0.0).applied(small(), variables(), batches), batches).tolist() == [0.0] * 3


def test_keeping_all_is_the_trained_model_to_the_bit():
    model, held = thresholded(small(), variables(), np.zeros(3, np.float32))
    dense = jax.jit(small().apply)(variables(), TOKENS)
    np.testing.assert_array_equal(jax.jit(model.apply)(held, TOKENS), dense)


def test_decoding_by_rows_equals_the_whole():
    thresholds = calibrate(small(), variables(), [{"tokens": TOKENS}], 0.8)
    model, held = thresholded(small(), variables(), thresholds)
    whole = jax.jit(model.apply)(held, TOKENS[:1, :12])
    fast, held = by_rows(model, held)
    np.testing.assert_allclose(jax.jit(fast.apply)(held, TOKENS[:1, :12]), whole, rtol=1e-4, atol=1e-4)
    step = jax.jit(functools.partial(fast.apply, method="step"))
    caches, logits = fast.init_cache(1, 12), []
    for cut in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 12))):  # a prompt, then single tokens
        new, caches = step(held, TOKENS[:1, cut], caches)
        logits.append(new)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), whole, rtol=1e-4, atol=1e-4)


class OfValues(nn.Module):
    """The wrong tensor: what is small in x W_expand is left out."""

    hidden: int

    @nn.compact
    def __call__(self, x, train=False):
        threshold = self.variable("thresholds", "threshold", jnp.zeros, ()).value
        matrix = lambda name, *shape: self.param(name, lambda key: {"kernel": jnp.zeros(shape)})["kernel"]
        value = x @ matrix("expand", x.shape[-1], self.hidden)
        self.sow("magnitudes", "sizes", jnp.abs(value))
        h = jax.nn.silu(x @ matrix("gate", x.shape[-1], self.hidden)) * jnp.where(
            jnp.abs(value) >= threshold, value, 0
        )
        return h @ matrix("contract", self.hidden, x.shape[-1])


def chains(key, rows):
    """Texts of a random language: the next token hangs on the last two."""
    table = 5.0 * jax.random.normal(jax.random.key(7), (12, 12, 12))

    def write(state, key):
        before, last = state
        new = jax.random.categorical(key, table[before, last], axis=-1)
        return (last, new), new

    start = jnp.zeros(rows, int), jnp.zeros(rows, int)
    _, tokens = jax.lax.scan(write, start, jax.random.split(key, 33))
    return tokens.T


def loss_of(model, held, tokens):
    losses, _ = cross_entropy(model.apply(held, tokens[:, :-1]), tokens[:, 1:])
    return jnp.mean(losses)


TOY = small(Gated(64), depth=1)


@functools.cache
def trained():
    """A toy that has learnt that language."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 1000))

    def step(state, key):
        params, moments = state
        value, slope = jax.value_and_grad(lambda p: loss_of(TOY, {"params": p}, chains(key, 16)))(params)
        change, moments = optimizer.update(slope, moments)
        return (optax.apply_updates(params, change), moments), value

    @jax.jit
    def train(params):
        state = params, optimizer.init(params)
        (params, _), losses = jax.lax.scan(step, state, jax.random.split(jax.random.key(3), 1000))
        return params, losses

    params, losses = train(meta.unbox(TOY.init(jax.random.key(4), TOKENS))["params"])
    assert losses[-1] < 0.25 * losses[0]
    return {"params": params}


@pytest.mark.slow
def test_half_of_the_neurons_cost_far_less_perplexity_than_the_wrong_half():
    held, test = trained(), chains(jax.random.key(5), 64)
    seen = {"tokens": chains(jax.random.key(6), 32)}
    perplexity = lambda model, held: float(jnp.exp(jax.jit(loss_of, static_argnums=0)(model, held, test)))
    full = perplexity(TOY, held)
    ours = perplexity(*thresholded(TOY, held, calibrate(TOY, held, [seen], 0.5))) - full

    wrong = TOY.clone(block=TOY.block.clone(ffn=OfValues(64)))
    at = lambda threshold: held | {"thresholds": {"blocks": {"ffn": {"threshold": threshold}}}}
    _, told = jax.jit(functools.partial(wrong.apply, mutable=["magnitudes"]))(
        at(jnp.zeros(1)), seen["tokens"]
    )
    (sizes,) = told["magnitudes"]["blocks"]["ffn"]["sizes"]
    values = perplexity(wrong, at(jnp.median(sizes)[None])) - full

    relu = TOY.clone(block=TOY.block.clone(ffn=Gated(64, activation="relu")))
    rectified = perplexity(relu, held) - full
    none = perplexity(*thresholded(TOY, held, np.full(1, np.inf))) - full
    # Measured: of 1.956, half of the neurons cost 0.010, half of the values 0.164, ReLU 0.028, none 14.2.
    assert 2 * max(ours, 0.0) < min(rectified, values)
    assert 5 * max(ours, 0.0) < values < none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: calibrate(small(), variables(), [{"tokens": TOKENS}], 1.0),
            "sparsity is 1.0: give the share",
        ),
        (lambda: calibrate(small(), variables(), [], 0.5), "at least one batch"),
        (lambda: thresholded(small(MLP()), variables(), np.zeros(3)), "MLP is none"),
        (
            lambda: thresholded(small(Gated(HIDDEN, use_bias=True)), variables(), np.zeros(3)),
            "without biases",
        ),
        (lambda: thresholded(small(), variables(), np.zeros(2)), "2 thresholds for 3 layers"),
        (lambda: by_rows(small(), variables()), "leave neurons out"),
        (lambda: Thresholding(0.5, batches=0), "batches=0"),
    ],
)
def test_a_wrong_request_is_one_clear_message(change, message):
    with pytest.raises(UsageError, match=message):
        change()
