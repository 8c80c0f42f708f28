"""The selective scan by Mosaic TPU: channels along lanes, the numbers of a state along sublanes.

    grid (batch, channels, chunks of tokens), the last one in the order of the scan

A program goes through the tokens of its chunk one by one, of which a tile of 8 to 32 is written out. The
state `[S, channels]` is in registers, and between chunks in vector memory. What a token writes and reads is a
column of B^T and C^T, spread over the lanes. There are three kernels:

    forward     y, and the state behind the last chunk
    starts      the state before every chunk, for the next
    backward    walks the chunks the other way round, and in each computes the states before all its tokens
                again, into vector memory. With g the cotangent of h_t and p = exp(e_t A) h_{t-1}:
                  g = C_t dy_t + exp(e_{t+1} A) g    dC_t = sum_i h_t dy_t       dB_t = sum_i g dt_t u_t
                  d(dt u)_t = sum_s g B_t            de_t = sum_s g p A          dA = sum_t g p e_t

Programs of other channels give their own sums over channels, and those of other rows theirs of dA; XLA adds
them. Lengths are filled up by tokens whose step is 0, which pass every state on.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import blocks
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded, rounded
from pallas_kernels.selective_scan import cost

# Tokens of a chunk, and channels for states of 16 numbers: backward such a chunk of states takes 8 MiB.
# What is written out hides what each tile begins with, so that is more of a longer sequence.
BLOCKS = {"tokens": 256, "channels": 512, "rows": 32}
DTYPES = ("bfloat16", "float32")
LARGEST_STATE = 64
# Rows of a tile in registers are 8, of 16-bit numbers 16.
SUBLANES, LANES = 8, 128
VECTOR_MEMORY = 32 * 2**20


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
    scan = _Scan(u, dt, A, B, C, hidden, decay, reverse)
    place = scan.ahead
    y, last = scan.call(
        functools.partial(_forward, scan=scan),
        [*scan.inputs(place), *scan.before],
        [scan.tokens_of(place, u.dtype), scan.state_of()],
        cost.forward(u, dt, A, B, C, hidden, decay),
        "selective_scan",
        interpret,
    )
    return scan.restored(y), scan.state_restored(last)


def backward(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    hidden: jax.Array | None,
    decay: jax.Array | None,
    cotangents: tuple[jax.Array, jax.Array],
    *,
    reverse: bool,
    interpret: Interpret,
) -> tuple[jax.Array | None, ...]:
    """Cotangents of all arguments."""
    scan = _Scan(u, dt, A, B, C, hidden, decay, reverse)
    of_starts = cost.starts(u, dt, A, B, hidden, decay, scan.chunks)
    (starts,) = scan.call(
        functools.partial(_starts, scan=scan),
        [*scan.inputs(scan.ahead)[:-1], *scan.before],
        [scan.starts_of(scan.ahead)],
        of_starts,
        "selective_scan_starts",
        interpret,
    )
    place = scan.back
    d_y, d_last = scan.whole(cotangents[0]), scan.state_laid_out(cotangents[1])
    sums = [scan.sums_of(place), scan.sums_of(place)]
    more = [] if decay is None else [scan.tokens_of(place, decay.dtype)]
    d_u, d_dt, d_A, d_B, d_C, d_hidden, *d_decay = scan.call(
        functools.partial(_backward, scan=scan),
        [
            *scan.inputs(place),
            (starts, scan.starts_of(place)[1]),
            (d_y, scan.tokens_of(place, u.dtype)[1]),
            (d_last, scan.state_of()[1]),
        ],
        [
            scan.tokens_of(place, u.dtype),
            scan.tokens_of(place, dt.dtype),
            scan.state_of(),
            *sums,
            scan.state_of(),
            *more,
        ],
        cost.backward(u, dt, A, B, C, hidden, decay, scan.chunks),
        "selective_scan_backward",
        interpret,
        pltpu.VMEM((scan.tiles, scan.rows, scan.states, scan.channels), jnp.float32),
    )
    d_rates = jnp.sum(scan.state_restored(d_A), axis=0).astype(A.dtype)
    return (
        scan.restored(d_u),
        scan.restored(d_dt),
        d_rates,
        scan.selected_restored(d_B).astype(B.dtype),
        scan.selected_restored(d_C).astype(C.dtype),
        None if hidden is None else scan.state_restored(d_hidden).astype(hidden.dtype),
        None if decay is None else scan.restored(*d_decay),
    )


class _Scan:
    """How the arrays are cut, and the order in which a program goes through them.

    Attributes:
      channels: of a program.
      states: numbers of a state, filled up to whole sublanes.
      tokens: of a chunk.
      lanes: tokens of a chunk, filled up to whole lanes.
      chunks: of a sequence.
      rows: tokens of a tile.
      tiles: of a chunk.
      timed: whether states decay over a time of their own.
      before: the state before the first token and how it is cut, where there is one.
    """

    def __init__(
        self,
        u: jax.Array,
        dt: jax.Array,
        A: jax.Array,
        B: jax.Array,
        C: jax.Array,
        hidden: jax.Array | None,
        decay: jax.Array | None,
        reverse: bool,
    ):
        arrays = dict(u=u, dt=dt, A=A, B=B, C=C, hidden=hidden, decay=decay)
        for name, array in arrays.items():
            if array is not None and array.dtype.name not in DTYPES:
                raise Unsupported(
                    f"selective_scan on TPU takes {' or '.join(DTYPES)}, and {name} is {array.dtype}."
                )
        self.batch, self.length, self.inner = u.shape
        self.state, self.reverse, self.timed = A.shape[1], reverse, decay is not None
        if self.state > LARGEST_STATE:
            raise Unsupported(
                f"selective_scan on TPU takes states of up to {LARGEST_STATE} numbers, not {self.state}."
            )
        chosen = blocks("selective_scan", f"s{self.state}", BLOCKS)
        self.states = rounded(self.state, SUBLANES)
        units = rounded(self.inner, LANES) // LANES
        most = max(chosen["channels"] * 16 // max(self.states, 16) // LANES, 1)
        self.channels = LANES * max(part for part in range(1, most + 1) if units % part == 0)
        self.blocks = units * LANES // self.channels
        narrow = any(array.dtype.itemsize < 4 for array in arrays.values() if array is not None)
        self.rows = chosen["rows"] if self.length > LANES else SUBLANES * (1 + narrow)
        self.tokens = min(chosen["tokens"], rounded(self.length, self.rows))
        self.lanes = rounded(self.tokens, LANES)
        self.chunks, self.tiles = -(-self.length // self.tokens), self.tokens // self.rows
        self.arrays = [self.whole(x) for x in (u, dt, *([decay] if decay is not None else []))]
        self.rates = self.state_laid_out(A[None])[0]  # [S', I']
        self.selected = [
            padded(padded(x.swapaxes(1, 2), 1, SUBLANES), 2, self.lanes) for x in (B, C)
        ]  # [B, S', N'']
        self.before = [] if hidden is None else [(self.state_laid_out(hidden), self.state_of()[1])]

    def whole(self, x: jax.Array) -> jax.Array:
        """`[B, N', I']` of `[B, N, I]`."""
        return padded(padded(x, 1, self.tokens), 2, LANES)

    def restored(self, x: jax.Array) -> jax.Array:
        return x[:, : self.length, : self.inner]

    def state_laid_out(self, x: jax.Array) -> jax.Array:
        """`[B, S', I']` in float32 of `[B, I, S]`."""
        return padded(padded(x.astype(jnp.float32).swapaxes(1, 2), 1, SUBLANES), 2, LANES)

    def state_restored(self, x: jax.Array) -> jax.Array:
        return x[:, : self.state, : self.inner].swapaxes(1, 2)

    def selected_restored(self, x: jax.Array) -> jax.Array:
        """`[B, N, S]` of the sums `[B, blocks, S', N'']` of blocks of channels."""
        return jnp.sum(x, axis=1)[:, : self.state, : self.length].swapaxes(1, 2)

    # Blocks: shapes of outputs and how they are cut.

    def ahead(self, j: Any) -> Any:
        """The chunk that is read at step j."""
        return self.chunks - 1 - j if self.reverse else j

    def back(self, j: Any) -> Any:
        """The same of the backward pass."""
        return j if self.reverse else self.chunks - 1 - j

    def tokens_of(self, place: Callable[[Any], Any], dtype: Any) -> tuple[Any, pl.BlockSpec]:
        shape = (self.batch, self.chunks * self.tokens, self.blocks * self.channels)
        spec = pl.BlockSpec((None, self.tokens, self.channels), lambda b, i, j: (b, place(j), i))
        return jax.ShapeDtypeStruct(shape, dtype), spec

    def state_of(self) -> tuple[Any, pl.BlockSpec]:
        shape = (self.batch, self.states, self.blocks * self.channels)
        spec = pl.BlockSpec((None, self.states, self.channels), lambda b, i, j: (b, 0, i))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def starts_of(self, place: Callable[[Any], Any]) -> tuple[Any, pl.BlockSpec]:
        shape = (self.batch, self.chunks, self.states, self.blocks * self.channels)
        block = (None, None, self.states, self.channels)
        spec = pl.BlockSpec(block, lambda b, i, j: (b, place(j), 0, i))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def sums_of(self, place: Callable[[Any], Any]) -> tuple[Any, pl.BlockSpec]:
        """Sums over the channels of a block."""
        shape = (self.batch, self.blocks, self.states, self.chunks * self.lanes)
        block = (None, None, self.states, self.lanes)
        spec = pl.BlockSpec(block, lambda b, i, j: (b, i, 0, place(j)))
        return jax.ShapeDtypeStruct(shape, jnp.float32), spec

    def inputs(self, place: Callable[[Any], Any]) -> list[tuple[Any, pl.BlockSpec]]:
        """u, dt and where it is given the decay; A^T, B^T, C^T."""
        of_rates = pl.BlockSpec((self.states, self.channels), lambda b, i, j: (0, i))
        selected = pl.BlockSpec((None, self.states, self.lanes), lambda b, i, j: (b, 0, place(j)))
        return [
            *((x, self.tokens_of(place, x.dtype)[1]) for x in self.arrays),
            (self.rates, of_rates),
            *((x, selected) for x in self.selected),
        ]

    def call(
        self,
        body: Callable[..., None],
        inputs: list[tuple[Any, pl.BlockSpec]],
        outputs: list[tuple[Any, pl.BlockSpec]],
        estimate: pl.CostEstimate,
        name: str,
        interpret: Interpret,
        *more: Any,
    ) -> list[Any]:
        """Runs a kernel whose scratch is a state, and more."""
        return pl.pallas_call(
            body,
            grid=(self.batch, self.blocks, self.chunks),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[shape for shape, _ in outputs],
            scratch_shapes=[pltpu.VMEM((self.states, self.channels), jnp.float32), *more],
            name=name,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
            ),
            cost_estimate=estimate,
            interpret=interpret,
        )(*(array for array, _ in inputs))

    # What a program does.

    def named(self, references: tuple[Any, ...], read: bool) -> tuple[list[Any], list[Any]]:
        """u, dt, e, A^T, B^T and where it is read C^T; then the others."""
        u, dt, *rest = references
        decay, *rest = rest if self.timed else (dt, *rest)
        return [u, dt, decay, *rest[: 2 + read]], list(rest[2 + read :])

    def tile(self, i: Any) -> Any:
        """The tile that is read at step i."""
        return self.tiles - 1 - i if self.reverse else i

    def order(self) -> list[int]:
        """The tokens of a tile in the order they are read in."""
        return list(range(self.rows))[:: -1 if self.reverse else 1]

    def at(self, k: Any) -> Any:
        """The tokens of tile k."""
        return pl.ds(pl.multiple_of(k * self.rows, self.rows), self.rows)

    def wide(self, reference: Any, k: Any) -> jax.Array:
        """Tile k `[rows, channels]` in float32."""
        return reference[self.at(k), :].astype(jnp.float32)

    def within(self, k: Any) -> tuple[Any, Any]:
        """The lanes that the tokens of tile k are among, and the first one there."""
        # Not // and %, which libtpu's profiler does not follow.
        start = (k * self.rows) & -LANES
        return pl.ds(pl.multiple_of(start, LANES), LANES), (k * self.rows) & (LANES - 1)

    def columns(self, reference: Any, k: Any) -> jax.Array:
        """`[S, 128]`, of which the first columns are those of the tokens of tile k."""
        lanes, start = self.within(k)
        return pltpu.roll(reference[:, lanes].astype(jnp.float32), (LANES - start) & (LANES - 1), 1)

    def walk(self, named: list[Any], state: Any, visit: Callable[[Any], tuple[Any, Any]]) -> jax.Array:
        """Takes a state through a chunk.

        Args:
          named: u, dt, e, A^T, B^T.
          state: before the chunk.
          visit: for a tile, what is told the states before and after each of its tokens, and what is done
            at its end.
        """
        u, dt, decay, of_rates, written = named
        rates = of_rates[...]

        def tile(i: Any, state: jax.Array) -> jax.Array:
            k = self.tile(i)
            since = self.wide(decay, k)
            x = self.wide(dt, k) * self.wide(u, k)
            columns = self.columns(written, k)
            seen, done = visit(k)
            for r in self.order():
                before = state
                state = jnp.exp(since[r : r + 1] * rates) * before
                state += x[r : r + 1] * columns[:, r : r + 1]
                seen(r, before, state)
            done()
            return state

        return lax.fori_loop(0, self.tiles, tile, state)


def _begin(scan: _Scan, state: Any, before: list[Any]) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = before[0][...] if before else jnp.zeros_like(state)


def _forward(*references: Any, scan: _Scan) -> None:
    (*named, read), (*before, y, last, state) = scan.named(references, read=True)
    _begin(scan, state, before)

    def visit(k: Any) -> tuple[Any, Any]:
        columns = scan.columns(read, k)
        rows: dict[int, jax.Array] = {}

        def seen(r: int, _: jax.Array, after: jax.Array) -> None:
            rows[r] = jnp.sum(after * columns[:, r : r + 1], axis=0, keepdims=True)  # [1, channels]

        return seen, lambda: _put(y, scan.at(k), rows)

    state[...] = scan.walk(named, state[...], visit)

    @pl.when(pl.program_id(2) == scan.chunks - 1)
    def _() -> None:
        last[...] = state[...]


def _starts(*references: Any, scan: _Scan) -> None:
    named, (*before, starts, state) = scan.named(references, read=False)
    _begin(scan, state, before)
    starts[...] = state[...]
    state[...] = scan.walk(named, state[...], lambda _: (lambda *_: None, lambda: None))


def _put(reference: Any, at: Any, rows: dict[int, jax.Array]) -> None:
    reference[at, :] = _tile(rows).astype(reference.dtype)


def _tile(rows: dict[int, jax.Array]) -> jax.Array:
    """`[rows, channels]` of rows `[1, channels]`, found in any order."""
    return jnp.concatenate([rows[r] for r in range(len(rows))], axis=0)


def _lanes(x: jax.Array) -> jax.Array:
    """`[S, 128]`, the sum of the lanes that stand alike."""
    return functools.reduce(jnp.add, jnp.split(x, x.shape[1] // LANES, axis=1))


def _summed(parts: dict[int, jax.Array]) -> jax.Array:
    """`[rows, S, 128]`, in every lane the sum over the lanes: by the matrix unit, the others are slower."""
    stacked = jnp.concatenate([parts[r] for r in range(len(parts))], axis=0)
    ones = jnp.ones((LANES, LANES), jnp.float32)
    total = jnp.dot(stacked, ones, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return total.reshape(len(parts), -1, LANES)


def _backward(*references: Any, scan: _Scan) -> None:
    named, others = scan.named(references, read=True)
    starts, d_y, d_last, d_u, d_dt, d_a, d_b, d_c, d_before, *d_decay, g, states = others
    u, dt, decay, of_rates, written, read = named
    rates = of_rates[...]
    j = pl.program_id(2)

    @pl.when(j == 0)
    def _() -> None:
        g[...] = d_last[...]
        d_a[...] = jnp.zeros_like(d_a)

    def kept(k: Any) -> tuple[Any, Any]:
        rows: dict[int, jax.Array] = {}

        def seen(r: int, before: jax.Array, _: jax.Array) -> None:
            rows[r] = before

        def done() -> None:
            states[k] = jnp.stack([rows[r] for r in range(scan.rows)])

        return seen, done

    scan.walk(named[:-1], starts[...], kept)
    d_b[...] = jnp.zeros_like(d_b)
    d_c[...] = jnp.zeros_like(d_c)

    def tile(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        k = scan.tile(scan.tiles - 1 - i)
        g, d_rates = carry
        inputs, steps, since, above = (scan.wide(x, k) for x in (u, dt, decay, d_y))
        x = steps * inputs
        b, c = scan.columns(written, k), scan.columns(read, k)
        lanes, start = scan.within(k)
        lane = lax.broadcasted_iota(jnp.int32, b.shape, 1) - start
        d_b_parts: dict[int, jax.Array] = {}
        d_c_parts: dict[int, jax.Array] = {}
        before = states[k]  # [rows, S, channels]
        d_x: dict[int, jax.Array] = {}
        d_e: dict[int, jax.Array] = {}
        for r in scan.order()[::-1]:
            shrink = jnp.exp(since[r : r + 1] * rates)  # [S, channels]
            p = shrink * before[r]
            h = p + x[r : r + 1] * b[:, r : r + 1]
            g = g + above[r : r + 1] * c[:, r : r + 1]
            d_c_parts[r] = _lanes(h * above[r : r + 1])
            d_b_parts[r] = _lanes(g * x[r : r + 1])
            d_x[r] = jnp.sum(g * b[:, r : r + 1], axis=0, keepdims=True)
            p = g * p
            d_e[r] = jnp.sum(p * rates, axis=0, keepdims=True)
            d_rates = d_rates + p * since[r : r + 1]
            g = g * shrink
        for total, parts in ((d_b, d_b_parts), (d_c, d_c_parts)):
            sums = _summed(parts)
            found = total[:, lanes]
            for r in range(scan.rows):
                found = jnp.where(lane == r, sums[r], found)
            total[:, lanes] = found
        every, times, at = _tile(d_x), _tile(d_e), scan.at(k)  # [rows, channels]
        d_u[at, :] = (every * steps).astype(d_u.dtype)
        of_steps = every * inputs
        if scan.timed:
            d_decay[0][at, :] = times.astype(d_decay[0].dtype)
        else:
            of_steps += times
        d_dt[at, :] = of_steps.astype(d_dt.dtype)
        return g, d_rates

    g[...], d_a[...] = lax.fori_loop(0, scan.tiles, tile, (g[...], d_a[...]))

    @pl.when(j == scan.chunks - 1)
    def _() -> None:
        d_before[...] = g[...]
