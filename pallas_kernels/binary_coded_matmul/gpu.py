"""The product by Mosaic GPU for Hopper: as one with codes of a bit, plane by plane.

    sum_k x b  =  2 sum_k x p  -  sum_k x,        p = (b + 1) / 2

so what `pallas_kernels.quantized_matmul.gpu` does with a plane is done with each, and alpha is twice a scale.
Tables of sums, which LUT-GEMM keeps in shared memory, cannot be looked up there: no load of Mosaic GPU has an
index for each thread. Of Pallas Triton, which is deprecated, loads have one into global memory alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import versions
from pallas_kernels.binary_coded_matmul import cost
from pallas_kernels.emulate import emulated
from pallas_kernels.op import Interpret
from pallas_kernels.padding import padded
from pallas_kernels.quantized_matmul.gpu import Tiles


def forward(
    x: jax.Array, alpha: jax.Array, offset: jax.Array, signs: jax.Array, *, interpret: Interpret
) -> jax.Array:
    """As the reference."""
    plan = _Planes("binary_coded_matmul", x, alpha, (1,), alpha.shape[0])
    plgpu = versions.mosaic_gpu()
    rows = padded(x, 0, plan.rows)
    scales, offsets, planes = (
        padded(array, array.ndim - 1, plan.columns) for array in (alpha, offset, signs)
    )
    columns = planes.shape[2]
    kernel = versions.mosaic_gpu_kernel(
        plan.body,
        out=jax.ShapeDtypeStruct((plan.splits, columns, rows.shape[0]), jnp.float32),
        scratch=[
            plgpu.SMEM((plan.inputs, plan.columns), x.dtype),
            plgpu.SMEM((plan.columns, plan.rows), jnp.float32),
        ],
        grid=(columns // plan.columns, plan.splits, rows.shape[0] // plan.rows),
        grid_names=("columns", "part", "rows"),
        name="binary_coded_matmul",
        cost=cost.forward(x, alpha, offset, signs),
        approximate=True,
    )
    out = (emulated(kernel) if interpret else kernel)(
        plan.sums(rows), scales, offsets, plan.ordered(rows, 1), planes
    )
    return jnp.sum(out, axis=0).T[: x.shape[0], : alpha.shape[2]].astype(x.dtype)


class _Planes(Tiles):
    """What a program does."""

    def body(
        self, sums: Any, alpha: Any, offset: Any, numbers: Any, signs: Any, out: Any, bits: Any, out_tile: Any
    ) -> None:
        planes, many = alpha.shape[0], self.inputs // self.part
        n, part, r = (lax.axis_index(axis) for axis in ("columns", "part", "rows"))
        block = self.plgpu.BlockSpec

        def tile(place: Any) -> Any:
            return part * self.steps + place

        def group(place: Any) -> Any:
            return self.group_of(tile(place))

        specs = [
            block((many, self.rows), lambda place: (tile(place), r)),
            block((planes, many, self.columns), lambda place: (0, group(place), n)),
            block((many, self.columns), lambda place: (group(place), n)),
            block(
                (self.inputs // self.bytes_of(1), self.rows, self.bytes_of(1)),
                lambda place: (tile(place), r, 0),
            ),
            block((planes, self.inputs // 8, self.columns), lambda place: (0, tile(place), n)),
        ]

        def step(_: Any, sums: Any, alpha: Any, offset: Any, numbers: Any, signs: Any, total: Any) -> Any:
            for plane in range(planes):
                self.unpack(signs.at[plane], 1, 0, bits)

                def of_part(j: Any, total: Any, plane: int = plane) -> Any:
                    own = self.along(sums, j, 1)
                    plus = self.product(bits, j, 1, numbers)  # [columns, rows]
                    total = total + (2 * plus - own) * self.along(alpha.at[plane], j, 0)
                    return total if plane else total + own * self.along(offset, j, 0)

                total = lax.fori_loop(0, many, of_part, total) if many > 1 else of_part(0, total)
            return total

        at = pl.ds(n * self.columns, self.columns), pl.ds(r * self.rows, self.rows)
        self.stream(step, specs, [sums, alpha, offset, numbers, signs], out_tile, out.at[part, *at])
