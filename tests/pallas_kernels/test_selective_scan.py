"""The scan by kernels: the recurrence token by token, in pieces and in both directions, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.op import Unsupported
from pallas_kernels.selective_scan import selective_scan, tpu
from tests.pallas_kernels.cases.selective_scan import numbers

WAYS = {
    "reference": dict(implementation="reference"),
    "gpu": dict(implementation="gpu", interpret=True),
    "tpu": dict(implementation="tpu", interpret=pltpu.InterpretParams()),
}


def scanned(way, *arrays, **options):
    return jax.jit(functools.partial(selective_scan, **WAYS[way], **options))(*arrays)


def brute(u, dt, A, B, C, hidden, decay, first):
    """Token by token in float64."""
    u, dt, A, B, C, hidden, decay = (x.astype(np.float64) for x in (u, dt, A, B, C, hidden, decay))
    y = np.zeros(u.shape)
    for b, n in np.ndindex(*u.shape[:2]):
        before = np.zeros_like(hidden[b]) if first[b, n] else hidden[b]
        hidden[b] = np.exp(decay[b, n, :, None] * A) * before + (dt[b, n] * u[b, n])[:, None] * B[b, n]
        y[b, n] = hidden[b] @ C[b, n]
    return y, hidden


@pytest.mark.parametrize("way", WAYS)
def test_is_the_recurrence(way, draw):
    arrays = numbers(21, 12, 3, step=0.5, batch=2)
    hidden = draw.normal(size=(2, 12, 3)).astype(np.float32)
    decay = arrays[1] + np.float32(0.3)
    first = draw.random((2, 21)) < 0.2
    for one, expected in zip(
        scanned(way, *arrays, hidden, decay, first), brute(*arrays, hidden, decay, first), strict=True
    ):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_backwards_is_forwards_over_the_reversed_tokens(way):
    u, dt, A, B, C = numbers(21, 12, 3, batch=2)
    y, last = scanned(way, u, dt, A, B, C, reverse=True)
    turned, same = scanned("reference", u[:, ::-1], dt[:, ::-1], A, B[:, ::-1], C[:, ::-1])
    np.testing.assert_allclose(y, turned[:, ::-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["gpu", "tpu"])
def test_a_prompt_in_pieces_and_then_token_by_token(way):
    """Each piece goes on where the last one ended; a single token is left to XLA unless it is named."""
    arrays = numbers(20, 8, 4)
    whole, last = scanned("reference", *arrays)
    y, hidden = [], None
    for start, end in ((0, 11), (11, 18), (18, 19), (19, 20)):
        piece = [x if x.ndim == 2 else x[:, start:end] for x in arrays]
        out, hidden = scanned(way, *piece, hidden)
        y.append(out)
    np.testing.assert_allclose(np.concatenate(y, 1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hidden, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "kernels"), [(1, 0), (2, 1)])
def test_a_single_token_is_left_to_xla(tokens, kernels):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), numbers(tokens, 128, 16))
    text = jax.jit(selective_scan).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels


def test_of_several_chunks_the_states_before_them_alone_are_kept(monkeypatch, capfd):
    """Of the reference, too; what the kernels hand on in memory has no state of every token."""
    monkeypatch.setattr(tpu, "BLOCKS", tpu.BLOCKS | {"tokens": 128})
    arrays, races = numbers(300, 8, 4), pltpu.InterpretParams(detect_races=True)

    def slopes(**how):
        loss = lambda *some: jnp.sum(jnp.sin(selective_scan(*some, **how)[0]))
        return jax.grad(loss, tuple(range(5)))

    by_kernel = slopes(implementation="tpu", interpret=races)
    expected = jax.jit(slopes(implementation="reference"))(*arrays)
    for found, one in zip(jax.jit(by_kernel)(*arrays), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-4)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    equations = jax.make_jaxpr(by_kernel)(*arrays).jaxpr.eqns
    largest = max(np.prod(variable.aval.shape) for one in equations for variable in one.outvars)
    assert largest == 384 * 128  # an input, filled up; states of all tokens would be 8 times that


def test_bfloat16_inputs_beside_float32_steps():
    u, *others = numbers(20, 12, 3)
    u = u.astype(jnp.bfloat16)
    y, last = scanned("tpu", u, *others)
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    exact, state = scanned("reference", u.astype(np.float32), *others)
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(last, state, rtol=1e-4, atol=1e-5)


U, DT, RATES, WRITTEN, READ = numbers(6, 8, 4)
BAD = [
    ((U[0], DT, RATES, WRITTEN, READ), {}, r"takes u \[B, N, I\] and A \[I, S\]"),
    ((U, DT, RATES.T, WRITTEN, READ), {}, r"takes u \[B, N, I\] and A \[I, S\]"),
    ((U[:, :0], DT, RATES, WRITTEN, READ), {}, "at least one token"),
    ((U, DT[:, 1:], RATES, WRITTEN, READ), {}, r"dt \[1, 5, 8\] must be \[1, 6, 8\]"),
    ((U, DT, RATES, WRITTEN[..., 1:], READ), {}, r"B \[1, 6, 3\] must be \[1, 6, 4\]"),
    ((U, DT, RATES, WRITTEN, READ, RATES), {}, r"hidden \[8, 4\] must be \[1, 8, 4\]"),
    ((U, DT, RATES, WRITTEN.astype(np.int32), READ), {}, "B is int32"),
    ((U, DT, RATES, WRITTEN, READ), dict(first=np.ones((1, 5), bool)), r"must be bool\[1, 6\]"),
    ((U.astype(np.float16), DT, RATES, WRITTEN, READ), WAYS["tpu"], "on TPU takes .* u is float16"),
    (numbers(2, 8, 65), WAYS["tpu"], "on TPU takes states of up to 64 numbers, not 65"),
    (numbers(2, 8, 65), WAYS["gpu"], "on GPU takes states of up to 64 numbers, not 65"),
    ((U, DT, RATES, WRITTEN, READ), dict(implementation="triton"), "none of 'reference', 'gpu', 'tpu'"),
]


@pytest.mark.parametrize(("arrays", "options", "message"), BAD)
def test_bad_input(arrays, options, message):
    with pytest.raises(Unsupported, match=message):
        selective_scan(*arrays, **options)
