"""The step by Mosaic TPU: rows stay in memory, and a program copies those of the active neurons itself.

XLA sorts the active neurons to the front, with their gates, and the program is told their numbers as scalars.
Copies of a group of rows are on their way while the group before is multiplied. A last group that is not full
fetches its last row several times, with gates of zero.

A matrix lies in tiles of words of 32 bits, in which two rows of bfloat16 stand one upon the other. Less
cannot be copied, so rows of 16 bits come in pairs, where one of a pair is active: of 8% active neurons 15%
are fetched, of 50% three quarters.

Both products are the matrix unit's. Rounded to bfloat16 a hidden number would lose bits; it is the sum of two
of those, which stand in rows of the operand that were empty else.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.blocks import blocks
from pallas_kernels.grids import copies
from pallas_kernels.op import Interpret, Unsupported
from pallas_kernels.padding import padded
from pallas_kernels.sparse_ffn import cost

# Rows of a group, which are under way at a time.
BLOCKS = {"rows": 128}
DTYPES = ("bfloat16", "float32")
LANES, WORD = 128, 4
# Rows of the small operand: what bfloat16 makes registers of.
ROWS = 16
VECTOR_MEMORY = 32 * 2**20


def forward(
    gate: jax.Array,
    x: jax.Array,
    expand: jax.Array,
    contract: jax.Array,
    *,
    active: int | None = None,
    interpret: Interpret,
) -> jax.Array:
    """As the reference."""
    group = _Group(gate, x, expand, contract)
    index, gates, missing = group.sorted(gate)
    wide = jnp.dtype(jnp.float32) if group.exact else jnp.dtype(jnp.bfloat16)
    same = jnp.broadcast_to(x.astype(wide), (ROWS, x.shape[0]))  # [16, V]
    whole = lambda array: pl.BlockSpec(array.shape, lambda *_: (0, 0))  # noqa: E731
    moved = cost.fetched(cost.counted(gate, active), gate.size, group.together)
    y = pl.pallas_call(
        group.body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[
                whole(gates),
                whole(same),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((1, contract.shape[1]), lambda *_: (0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, group.rows, expand.shape[1]), expand.dtype),
                pltpu.VMEM((2, group.rows, contract.shape[1]), contract.dtype),
                pltpu.VMEM((ROWS, contract.shape[1]), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((1, contract.shape[1]), jnp.float32),
        name="sparse_ffn",
        metadata=copies(cost.copied(moved, expand, contract)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VECTOR_MEMORY,
            # Numbers of rows are made above, of rows that there are: checks take as long as the copies.
            disable_bounds_checks=True,
        ),
        cost_estimate=cost.forward(gate, x, expand, contract, active=moved),
        interpret=interpret,
    )(missing, index, gates, same, expand, contract)
    return y[0].astype(x.dtype)


class _Group:
    """How the rows are grouped, and what is done with a group.

    Attributes:
      together: rows that are copied at once.
      rows: of a group.
      groups: that all neurons make.
      exact: whether products are those of float32.
    """

    def __init__(self, gate: jax.Array, x: jax.Array, expand: jax.Array, contract: jax.Array):
        for name, array in (("x", x), ("expand", expand)):
            if array.dtype.name not in DTYPES:
                raise Unsupported(
                    f"sparse_ffn on TPU takes {' or '.join(DTYPES)}, and {name} is {array.dtype}."
                )
        for name, array in (("expand", expand), ("contract", contract)):
            if array.shape[1] % LANES:
                raise Unsupported(
                    f"sparse_ffn on TPU takes rows of a multiple of {LANES} channels, and those of {name}"
                    f" have {array.shape[1]}."
                )
        self.together = WORD // expand.dtype.itemsize
        if gate.size % self.together:
            raise Unsupported(
                f"sparse_ffn on TPU copies rows of {expand.dtype} in pairs, which {gate.size} neurons do not"
                " make: give an even number."
            )
        self.exact = jnp.float32 in (x.dtype, expand.dtype)
        self.rows = min(blocks("sparse_ffn", expand.dtype.name, BLOCKS)["rows"], gate.size)
        self.units = self.rows // self.together
        self.groups = -(-gate.size // self.rows)

    def sorted(self, gate: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Numbers of the units, the active ones first, gates in that order, and minus groups that have none.

        Minus, as libtpu's profiler puts positive numbers where it knows none: to it no group is missing.
        """
        columns = self.split(gate.astype(jnp.float32))  # [units] each
        some = functools.reduce(jnp.logical_or, [column != 0 for column in columns])
        number = jnp.arange(some.size, dtype=jnp.int32)
        count = jnp.sum(some, dtype=jnp.int32)
        index, *columns = lax.sort((jnp.where(some, number, some.size), *columns), num_keys=1)
        # Those behind the active ones are the last of these again, whose gates are zero there.
        index = jnp.pad(index, (0, -index.size % self.units), constant_values=some.size)
        index = jnp.minimum(index, jnp.max(jnp.where(some, number, 0)))
        gates = self.joined([padded(column, 0, self.units) for column in columns])  # [groups, rows]
        missing = (count + self.units - 1) // self.units - self.groups
        return index, gates, missing.reshape(1)

    # By products, as TPUs hardly turn arrays whose last axis is short.

    def split(self, gate: jax.Array) -> list[jax.Array]:
        """Gates of the first rows of all units, of the second ones, and so on."""
        if self.together == 1:
            return [gate]
        lines = padded(gate, 0, LANES).reshape(-1, LANES)
        chosen = [np.eye(LANES, dtype=np.float32)[:, i :: self.together] for i in range(self.together)]
        return [jnp.dot(lines, columns, precision=lax.Precision.HIGHEST).reshape(-1) for columns in chosen]

    def joined(self, columns: list[jax.Array]) -> jax.Array:
        """The same gates, side by side for each group."""
        lines = [column.reshape(-1, self.units) for column in columns]
        if self.together == 1:
            return lines[0]
        chosen = [np.eye(self.rows, dtype=np.float32)[i :: self.together] for i in range(self.together)]
        each = [
            jnp.dot(line, rows, precision=lax.Precision.HIGHEST)
            for line, rows in zip(lines, chosen, strict=True)
        ]
        return functools.reduce(jnp.add, each)

    def body(
        self,
        missing: Any,
        index: Any,
        gates: Any,
        x: Any,
        expand: Any,
        contract: Any,
        out: Any,
        *scratch: Any,
    ) -> None:
        up, down, total, arrived = scratch
        count = jnp.minimum(self.groups + missing[0], self.groups)
        pairs = ((expand, up, 0), (contract, down, 1))

        def start(group: Any) -> None:
            slot = group & 1
            for unit in range(self.units):
                here = pl.ds(unit * self.together, self.together)
                row = index[group * self.units + unit] * self.together
                there = pl.ds(pl.multiple_of(row, self.together), self.together)
                for matrix, held, which in pairs:
                    semaphore = arrived.at[slot, which]
                    pltpu.make_async_copy(matrix.at[there], held.at[slot, here], semaphore).start()

        def arrive(slot: Any, which: int) -> jax.Array:
            # One wait for as many bytes as all copies of a group have.
            matrix, held, _ = pairs[which]
            as_many = matrix.at[pl.ds(0, self.rows)]
            pltpu.make_async_copy(as_many, held.at[slot], arrived.at[slot, which]).wait()
            return held[slot]

        def step(group: Any, _: None) -> None:
            @pl.when(group + 1 < count)
            def _() -> None:
                start(group + 1)

            slot = group & 1
            value = self.dot(x[...], arrive(slot, 0), 1)  # [16, rows], all alike
            h = value * gates[pl.ds(group, 1)]
            number = lax.broadcasted_iota(jnp.int32, h.shape, 0)
            if self.exact:
                h = jnp.where(number == 0, h, 0.0)
            else:
                most = h.astype(jnp.bfloat16).astype(jnp.float32)
                h = jnp.where(number == 0, most, jnp.where(number == 1, h - most, 0.0)).astype(jnp.bfloat16)
            total[...] += self.dot(h, arrive(slot, 1), 0)  # [16, C]

        total[...] = jnp.zeros_like(total)

        @pl.when(count > 0)
        def _() -> None:
            start(0)

        lax.fori_loop(0, count, step, None)
        out[...] = jnp.sum(total[...], axis=0, keepdims=True)

    def dot(self, a: jax.Array, b: jax.Array, over: int) -> jax.Array:
        """a b in float32, or a b^T where it is summed over the second side of b."""
        return lax.dot_general(
            *(a, b.astype(a.dtype)),
            (((1,), (over,)), ((), ())),
            precision=lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
