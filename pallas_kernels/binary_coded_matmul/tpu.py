"""The product by Mosaic TPU: signs become plus and minus one by bits alone, and planes are multiplied by.

    (word << 15 - p) & 0x80008000 ^ 0xbf80bf80

are two bfloat16, 1 for a bit of 1 and -1 for one of 0: a register of 16 x 128 signs takes three instructions.
Sums of a group are multiplied by its alpha. Looking sums up in tables takes none of the products, and is no
way for a TPU, which has no fast gather and whose matrix unit has nothing else to do.

x is arranged as `pallas_kernels.quantized_matmul.tpu` arranges it: a number of 16 bits holds the signs of 16
inputs, and a product takes 256 inputs at least, so that a piece of it fills registers.

    grid (columns, tiles of rows)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.binary_coded_matmul import cost
from pallas_kernels.lint import masks
from pallas_kernels.op import Interpret
from pallas_kernels.quantized_matmul.tpu import LANES, VECTOR_MEMORY, Blocks, as_float, as_stored, moved

# Both halves of a word: the sign, and what minus one and it differ in.
SIGNS, MINUS = (np.array(bits, np.uint32).view(np.int32).item() for bits in (0x80008000, 0xBF80BF80))
SPAN = 256


def forward(
    x: jax.Array, alpha: jax.Array, offset: jax.Array, signs: jax.Array, *, interpret: Interpret
) -> jax.Array:
    """As the reference."""
    planes, groups, columns = alpha.shape
    plan = _Planes("binary_coded_matmul", x, alpha, (1,), planes, SPAN)
    numbers, sums = plan.arranged(x)  # [m R', K], [R', G]
    tiles = numbers.shape[0] // plan.expanded
    dtype = x.dtype if plan.parts == 1 else jnp.dtype(jnp.float32)
    ragged = [*(f"in[{i}]" for i in (2, 3, 4)), "out[0]"] if columns % plan.columns else []
    y = pl.pallas_call(
        plan.body,
        grid=(-(-columns // plan.columns), tiles),
        in_specs=[
            pl.BlockSpec((plan.expanded, x.shape[1]), lambda n, r: (r, 0)),
            pl.BlockSpec((plan.rows, groups), lambda n, r: (r, 0)),
            pl.BlockSpec((planes, groups, plan.columns), lambda n, r: (0, 0, n)),
            pl.BlockSpec((groups, plan.columns), lambda n, r: (0, n)),
            pl.BlockSpec((planes, signs.shape[1], plan.columns), lambda n, r: (0, 0, n)),
        ],
        out_specs=pl.BlockSpec((plan.rows, plan.columns), lambda n, r: (r, n)),
        out_shape=jax.ShapeDtypeStruct((tiles * plan.rows, columns), dtype),
        scratch_shapes=[
            pltpu.VMEM((groups, plan.columns), jnp.float32),
            pltpu.VMEM((plan.rows, plan.columns), jnp.float32),
        ],
        name="binary_coded_matmul",
        metadata=masks(*ragged),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
        ),
        cost_estimate=cost.forward(x, alpha, offset, signs),
        interpret=interpret,
    )(numbers, sums, as_stored(alpha), as_stored(offset), signs)
    return plan.joined(y).astype(x.dtype)


class _Planes(Blocks):
    """What a program does."""

    def body(
        self, x: Any, sums: Any, alpha: Any, offset: Any, signs: Any, out: Any, scales: Any, total: Any
    ) -> None:
        total[...] = lax.dot(
            sums[...], as_float(offset[...]), precision=lax.Precision.HIGHEST
        )  # [R', columns]
        for plane in range(alpha.shape[0]):
            scales[...] = as_float(alpha[plane])
            self.add(x, signs.at[plane], scales, total)
        out[...] = total[...].astype(out.dtype)

    def add(self, x: Any, signs: Any, scales: Any, total: Any) -> None:
        """Adds the products with a plane."""

        def step(i: Any, _: None) -> None:
            size = self.step // 8
            part_of = signs[pl.ds(pl.multiple_of(i * size, 32), size)]
            words = pltpu.bitcast(part_of, jnp.int32)  # [step / 32, columns]
            pieces = [
                pltpu.bitcast((moved(words, 15 - p) & SIGNS) ^ MINUS, jnp.bfloat16) for p in range(self.each)
            ]
            rows = self.product // self.each
            for j in range(self.step // self.product):
                place = i * self.step + j * self.product
                part = lax.dot(
                    x[:, pl.ds(pl.multiple_of(place, LANES), self.product)],
                    jnp.concatenate([piece[j * rows : (j + 1) * rows] for piece in pieces]),
                    preferred_element_type=jnp.float32,
                )  # [m R', columns]
                first = lax.div(place, self.group)
                for m in range(self.many):
                    total[...] += part[m * self.rows : (m + 1) * self.rows] * scales[pl.ds(first + m, 1)]

        lax.fori_loop(0, self.inputs // self.step, step, None)
