"""Pruning of state-space models: the aligned scan, the score, and a Vim that is pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure.cost import count
from effjax.mixers.context import Context
from effjax.mixers.selective import selective_scan
from effjax.mixers.vision_mamba import VisionMamba
from effjax.tokens import ToPViM
from effjax.tokens.top_vim import importance
from tests.tokens.toy import IMAGES, difference, params_of, run, vit

VIM = dict(
    block=dict(mixer=dict(kind="vision_mamba", state=4), ffn=None, norm="rms"),
    class_place="middle",
    pool="token",
)
N, I, S = 11, 6, 4
KEPT = np.array([0, 1, 4, 6, 9, 10])


def scan_inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    u, dt = jax.random.normal(keys[0], (2, N, I)), jax.nn.softplus(jax.random.normal(keys[1], (2, N, I)))
    A = -jnp.exp(jax.random.normal(keys[2], (I, S)))
    B, C = jax.random.normal(keys[3], (2, N, S)), jax.random.normal(keys[4], (2, N, S))
    return u, dt, A, B, C, jnp.zeros((2, I, S))


def test_an_aligned_scan_is_the_whole_one_whose_missing_tokens_write_nothing():
    u, dt, A, B, C, h = scan_inputs()
    silent = jnp.zeros_like(u).at[:, KEPT].set(u[:, KEPT])
    whole, last = jax.jit(selective_scan)(silent, dt, A, B, C, h)
    passed = jnp.cumsum(dt, axis=1)[:, KEPT]
    steps = jnp.diff(passed, axis=1, prepend=jnp.zeros((2, 1, I)))
    few = lambda x: x[:, KEPT]
    scan = jax.jit(lambda *x: selective_scan(*x[:-1], decay=x[-1]))
    aligned, end = scan(few(u), few(dt), A, few(B), few(C), h, steps)
    np.testing.assert_allclose(aligned, whole[:, KEPT], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-6)
    naive, _ = scan(few(u), few(dt), A, few(B), few(C), h, few(dt))
    assert difference(naive, whole[:, KEPT]) > 0.01


def test_both_directions_decay_over_the_same_places():
    """A picture turned round, with its places, gives the turned result with the directions exchanged."""
    mixer = VisionMamba(state=4)
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    places = jnp.broadcast_to(jnp.asarray(KEPT)[None], (2, 6))
    params = mixer.init(jax.random.key(2), x, Context())
    apply = jax.jit(lambda p, x, places: mixer.apply(p, x, Context(positions=places)))
    held = dict(params["params"])
    held["forward"], held["backward"] = held["backward"], held["forward"]
    one = apply(params, x, places)
    other = apply({"params": held}, x[:, ::-1], 10 - places[:, ::-1])
    np.testing.assert_allclose(one, other[:, ::-1], rtol=1e-5, atol=1e-6)
    assert difference(apply(params, x, jnp.broadcast_to(jnp.arange(6)[None], (2, 6))), one) > 1e-4
    plain = mixer.apply(params, x, Context())
    close = apply(params, x, jnp.broadcast_to(jnp.arange(3, 9)[None], (2, 6)))
    np.testing.assert_allclose(close, plain, rtol=1e-5, atol=1e-6)
    naive = mixer.clone(aligned=False).apply(params, x, Context(positions=places))
    np.testing.assert_array_equal(naive, plain)


def test_the_score_counts_what_is_above_zero():
    output = jnp.array([[[1.0, -3.0], [0.5, 0.5], [-1.0, -1.0]]])
    np.testing.assert_allclose(importance(output), [[0.5, 0.5, 0.0]])


def test_a_vim_is_pruned_and_its_class_token_stays():
    params, model = params_of(**VIM), vit(**VIM)
    assert difference(run(model.clone(reduce=ToPViM(keep=1.0)), params), run(model, params)) <= 1e-6
    fast = model.clone(reduce=ToPViM(keep=0.5, layers=(0,)))
    got, sown = run(fast, params, mutable=["tokens"])
    assert got.shape == (2, 5)
    (origin,) = sown["tokens"]["layer_0"]
    origin = np.asarray(origin)
    assert (origin[:, 18] >= 0).all()  # of 36 patches the class token stands behind 18
    for row in origin:
        kept = row[row >= 0]
        assert len(kept) == 19
        np.testing.assert_array_equal(kept, np.sort(kept))
    assert count(fast.apply, params, IMAGES[:1]).macs < 0.8 * count(model.apply, params, IMAGES[:1]).macs
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(fast.apply(p, IMAGES) ** 2)))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_what_a_scan_does_not_know_is_refused():
    attention = vit().clone(reduce=ToPViM(keep=0.5))
    with pytest.raises(UsageError, match="attention knows nothing of 'output'"):
        jax.eval_shape(attention.init, jax.random.key(0), IMAGES)
    mixer, x = VisionMamba(state=4), jnp.zeros((1, 4, 8))
    with pytest.raises(UsageError, match="vision_mamba tells its output alone"):
        mixer.init(jax.random.key(0), x, Context(), ("keys",), method="observe")
