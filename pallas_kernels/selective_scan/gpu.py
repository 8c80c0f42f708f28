"""The selective scan by Mosaic GPU for Hopper: a warpgroup has 64 channels and goes along the sequence.

    grid (channels, batch)

The state `[64, S]` stays in registers from the first token to the last, four threads to a channel. Inputs
come by TMA, a chunk of tokens while the one before is read, and outputs leave the same way. Of each token a
program reads a number a channel and a number a state from shared memory.

Exponentials bound it and not memory: 16 of them stand against about 10 bytes of a channel and token.

Powers are those of two: exp(e A) = 2^(e A log2 e). Lengths are filled up by tokens whose step is 0, which
pass every state on. There is no kernel backward: dB and dC are sums over channels, so over all four warps, of
every token, which would meet in shared memory at each. The reference is differentiated, chunk by chunk.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import versions
from pallas_kernels.blocks import blocks
from pallas_kernels.emulate import emulated
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded
from pallas_kernels.selective_scan import cost

# Tokens of a chunk, and chunks that are under way at a time.
BLOCKS = {"tokens": 32, "stages": 2}
DTYPES = ("bfloat16", "float16", "float32")
LARGEST_STATE = 64
# Rows of a layout of registers, and what its columns come in.
CHANNELS, COLUMNS = 64, 8
# Tokens that are written out: all but the state of the next may be done meanwhile.
UNROLL = 4


def forward(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    hidden: jax.Array | None = None,
    decay: jax.Array | None = None,
    *,
    reverse: bool,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array]:
    """As the reference."""
    (batch, length, inner), state = u.shape, A.shape[1]
    if state > LARGEST_STATE:
        raise Unsupported(
            f"selective_scan on GPU takes states of up to {LARGEST_STATE} numbers, not {state}."
        )
    chosen = blocks("selective_scan", f"s{state}", BLOCKS)
    plgpu, tokens = versions.mosaic_gpu(), chosen["tokens"]
    chunks, states = -(-length // tokens), rounded(state, COLUMNS)

    def whole(x: jax.Array) -> jax.Array:
        return padded(padded(x, 1, tokens), 2, CHANNELS)

    def selected(x: jax.Array) -> jax.Array:
        return padded(padded(x.astype(jnp.float32), 1, tokens), 2, COLUMNS)

    def laid_out(x: jax.Array) -> jax.Array:
        return padded(padded(x.astype(jnp.float32), -2, CHANNELS), -1, COLUMNS)

    rates = laid_out(A) * math.log2(math.e)  # [I', S']
    along = [whole(x) for x in (u, dt, *([] if decay is None else [decay]))]  # [B, N', I']
    begin = [] if hidden is None else [laid_out(hidden)]  # [B, I', S']

    def body(rates: Any, written: Any, read: Any, *others: Any) -> None:
        *before, y, last, tile, arrived = others[len(along) :]
        i, b = lax.axis_index("channels"), lax.axis_index("batch")
        channels = pl.ds(i * CHANNELS, CHANNELS)

        def fetched(source: Any) -> jax.Array:
            plgpu.copy_gmem_to_smem(source, tile, arrived)
            plgpu.barrier_wait(arrived)
            return plgpu.layout_cast(tile[...], plgpu.Layout.WGMMA)

        powers = fetched(rates.at[channels])  # [64, S']
        shape = powers.shape
        start = fetched(before[0].at[b, channels]) if before else jnp.zeros_like(powers)

        def step(place: Any, b_tile: Any, c_tile: Any, *tiles: Any) -> jax.Array:
            *inputs, y_tile, state = tiles

            def token(t: Any, state: jax.Array) -> jax.Array:
                u, dt, *decay = (one[t].astype(jnp.float32) for one in inputs)  # [64]
                over = decay[0] if decay else dt
                shrink = jnp.exp2(lax.broadcast_in_dim(over, shape, (0,)) * powers)
                added = lax.broadcast_in_dim(dt * u, shape, (0,)) * lax.broadcast_in_dim(
                    b_tile[t], shape, (1,)
                )
                state = shrink * state + added  # [64, S']
                out = jnp.sum(state * lax.broadcast_in_dim(c_tile[t], shape, (1,)), axis=1)
                y_tile[t] = out.astype(y_tile.dtype)
                return state

            def some(n: Any, state: jax.Array) -> jax.Array:
                for m in range(UNROLL):
                    t = n * UNROLL + m
                    state = token(tokens - 1 - t if reverse else t, state)
                return state

            return lax.fori_loop(0, tokens // UNROLL, some, state)

        def at(j: Any) -> tuple[Any, Any]:
            return (chunks - 1 - j if reverse else j), 0

        of_channels = plgpu.BlockSpec((tokens, CHANNELS), at)
        of_states = plgpu.BlockSpec((tokens, states), at)
        run = plgpu.emit_pipeline(
            step,
            grid=(chunks,),
            in_specs=[of_states, of_states, *[of_channels] * len(along)],
            out_specs=[of_channels],
            max_concurrent_steps=chosen["stages"],
            init_carry=start,
        )
        everything = [x.at[b, :, channels] for x in (*others[: len(along)], y)]
        end = run(written.at[b], read.at[b], *everything)
        tile[...] = end
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, last.at[b, channels])
        plgpu.wait_smem_to_gmem(0)

    kernel = versions.mosaic_gpu_kernel(
        body,
        out=(
            jax.ShapeDtypeStruct(along[0].shape, u.dtype),
            jax.ShapeDtypeStruct((batch, *rates.shape), jnp.float32),
        ),
        scratch=[plgpu.SMEM((CHANNELS, states), jnp.float32), plgpu.Barrier()],
        grid=(rates.shape[0] // CHANNELS, batch),
        grid_names=("channels", "batch"),
        name="selective_scan",
        cost=cost.forward(u, dt, A, B, C, hidden, decay),
        approximate=True,
    )
    y, last = (emulated(kernel) if interpret else kernel)(rates, selected(B), selected(C), *along, *begin)
    return y[:, :length, :inner], last[:, :inner, :state]
