"""The selective scan in plain JAX: what the kernels are held against, and what runs where there is none."""

import jax
import jax.numpy as jnp
from jax import lax

# Tokens of which the states are in memory at once.
CHUNK = 128


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    hidden: jax.Array | None = None,
    decay: jax.Array | None = None,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """`[B, N, I]` outputs in the type of u and the `[B, I, S]` last state in float32.

    Chunk after chunk, each computed again for its derivative: memory grows with the chunk and not with the
    sequence. States, powers and sums are float32.
    """
    batch, length, inner = u.shape
    if hidden is None:
        hidden = jnp.zeros((batch, inner, A.shape[1]), jnp.float32)
    decay = dt if decay is None else decay
    chunk = min(CHUNK, length)
    rates = A.astype(jnp.float32)

    def cut(x: jax.Array) -> jax.Array:  # [B, N, X] to [N / chunk, B, chunk, X], in the order of the scan
        x = jnp.flip(x, 1) if reverse else x
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -length % chunk), (0, 0)])
        return x.reshape(batch, -1, chunk, x.shape[2]).swapaxes(0, 1)

    @jax.checkpoint
    def one(state: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        return lax.platform_dependent(state, rates, *parts, cpu=_one_by_one, default=_all_at_once)

    last, y = lax.scan(one, hidden.astype(jnp.float32), tuple(map(cut, (u, dt, decay, B, C))))
    y = y.swapaxes(0, 1).reshape(batch, -1, inner)[:, :length]  # [B, N, I]
    return (jnp.flip(y, 1) if reverse else y).astype(u.dtype), last


def _all_at_once(
    state: jax.Array, A: jax.Array, u: jax.Array, dt: jax.Array, decay: jax.Array, B: jax.Array, C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The state behind a chunk and the outputs in it, in a logarithm of its length."""
    shrunk = jnp.exp(decay[..., None] * A[None, None])  # [B, chunk, I, S]
    written = (dt * u)[..., None] * B[:, :, None]  # [B, chunk, I, S]
    kept, added = lax.associative_scan(_composed, (shrunk, written), axis=1)
    states = kept * state[:, None] + added  # [B, chunk, I, S]
    return states[:, -1], _read("bnis,bns->bni", states, C)


def _one_by_one(
    state: jax.Array, A: jax.Array, u: jax.Array, dt: jax.Array, decay: jax.Array, B: jax.Array, C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same token after token, which on a CPU is faster."""

    def token(state: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        u, dt, decay, B, C = of
        state = jnp.exp(decay[..., None] * A[None]) * state + (dt * u)[..., None] * B[:, None]  # [B, I, S]
        return state, _read("bis,bs->bi", state, C)

    state, y = lax.scan(token, state, tuple(x.swapaxes(0, 1) for x in (u, dt, decay, B, C)))
    return state, y.swapaxes(0, 1)


def _read(axes: str, states: jax.Array, C: jax.Array) -> jax.Array:
    """What is read from states; a TPU would round them to bfloat16 otherwise."""
    return jnp.einsum(axes, states, C, precision=lax.Precision.HIGHEST)


def _composed(
    earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Two maps h -> a h + b, one after the other."""
    return earlier[0] * later[0], later[0] * earlier[1] + later[1]
