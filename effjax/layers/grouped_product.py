"""Runs of rows, each multiplied with a matrix of its own: all experts of a mixture in one product.

    y[r] = x[r] W[e]        where row r lies in the run of matrix e, and 0 behind the last run

One product, two ways to write it, chosen when it is lowered for a platform: `jax.lax.ragged_dot`, and on
CPUs a loop over the runs that have rows, in blocks of rows. There XLA writes the ragged product as a dense
one: a copy of x for every matrix, masked, and as many times the work as there are matrices.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rows = Float[Array, "m i"]
Results = Float[Array, "m o"]
Kernels = Float[Array, "e i o"]
Sizes = Int[Array, " e"]

# Rows of a block: the largest while they fit, and what is left of a run goes into the smallest that holds it.
# Every block lays its matrix out anew for the processor, so that few large ones beat many small ones.
_BLOCKS = (32, 64, 128, 192, 256, 384, 512)


def grouped(rows: Float[Array, "m i"], kernels: Float[Array, "e i o"], sizes: Sizes) -> Float[Array, "m o"]:
    """Multiplies each run of rows with the matrix of its own.

    Args:
      rows: run after run.
      kernels: a matrix for every run.
      sizes: rows of each run; together at most all rows.
    """
    rows, kernels = nn.dtypes.promote_dtype(rows, kernels)
    return _grouped(rows, kernels, sizes)


# Under `vmap` one after another: `ragged_dot` itself knows only that everything has the new axis.
@jax.custom_batching.sequential_vmap
def _product(rows: Rows, kernels: Kernels, sizes: Sizes) -> Results:
    return jax.lax.platform_dependent(rows, kernels, sizes, cpu=run_by_run, default=jax.lax.ragged_dot)


@jax.custom_batching.sequential_vmap
def _gradients(rows: Rows, kernels: Kernels, sizes: Sizes, g: Results) -> tuple[Rows, Kernels]:
    def ragged(rows: Rows, kernels: Kernels, sizes: Sizes, g: Results) -> tuple[Rows, Kernels]:
        return jax.vjp(functools.partial(jax.lax.ragged_dot, group_sizes=sizes), rows, kernels)[1](g)

    def by_runs(rows: Rows, kernels: Kernels, sizes: Sizes, g: Results) -> tuple[Rows, Kernels]:
        return run_by_run(g, kernels, sizes, transposed=True), kernel_gradient(rows, g, sizes)

    return jax.lax.platform_dependent(rows, kernels, sizes, g, cpu=by_runs, default=ragged)


@jax.custom_vjp
def _grouped(rows: Rows, kernels: Kernels, sizes: Sizes) -> Results:
    return _product(rows, kernels, sizes)


def _forward(rows: Rows, kernels: Kernels, sizes: Sizes) -> tuple[Results, tuple[Rows, Kernels, Sizes]]:
    return _product(rows, kernels, sizes), (rows, kernels, sizes)


def _backward(kept: tuple[Rows, Kernels, Sizes], g: Results) -> tuple[Rows, Kernels, None]:
    return *_gradients(*kept, g), None


_grouped.defvjp(_forward, _backward)


def run_by_run(rows: Rows, kernels: Float[Array, "e a b"], sizes: Sizes, transposed: bool = False) -> Results:
    """The product as a loop over the runs; `transposed` multiplies with the matrices turned over."""
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    inputs, outputs = kernels.shape[1:][::-1] if transposed else kernels.shape[1:]
    large = _blocks(len(rows))[-1]

    def run(expert: Int[Array, ""], at: Int[Array, ""], end: Int[Array, ""], out: Results) -> Results:
        kernel = jax.lax.dynamic_index_in_dim(kernels, expert, keepdims=False)

        def product(size: int, start: Int[Array, ""]) -> Array:
            x = jax.lax.dynamic_slice(rows, (start, 0), (size, inputs))
            return jax.lax.dot_general(x, kernel, contracted)  # [size, O]

        def whole(i: Int[Array, ""], out: Results) -> Results:
            start = at + i * large
            return jax.lax.dynamic_update_slice(out, product(large, start), (start, 0))

        def window(size: int, first: Int[Array, ""], start: Int[Array, ""]) -> Array:
            """What is left of the run, in a window of the largest size."""
            within = jnp.minimum(first, len(rows) - size)
            y = product(size, within) if size else jnp.zeros((0, outputs), rows.dtype)
            return jax.lax.dynamic_update_slice(jnp.zeros((large, outputs), y.dtype), y, (within - start, 0))

        out = jax.lax.fori_loop(0, (end - at) // large, whole, out)
        first = end - (end - at) % large
        start = jnp.minimum(first, len(rows) - large)
        y = _smallest(window, end - first, len(rows), first, start)  # [large, O]
        mine = start + jnp.arange(large)
        before = jax.lax.dynamic_slice(out, (start, 0), (large, outputs))
        y = jnp.where(((mine >= first) & (mine < end))[:, None], y, before)
        return jax.lax.dynamic_update_slice(out, y, (start, 0))

    return _runs(run, sizes, jnp.zeros((len(rows), outputs), rows.dtype))


def kernel_gradient(rows: Rows, g: Results, sizes: Sizes) -> Kernels:
    """The gradient of the matrices: of each, the products of the rows of its run."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    shape = rows.shape[1], g.shape[1]
    large = _blocks(len(rows))[-1]

    def run(expert: Int[Array, ""], at: Int[Array, ""], end: Int[Array, ""], out: Kernels) -> Kernels:
        def product(size: int, start: Int[Array, ""], first: Int[Array, ""] | None = None) -> Array:
            x = jax.lax.dynamic_slice(rows, (start, 0), (size, shape[0]))
            if first is not None:
                places = start + jnp.arange(size)
                x = jnp.where(((places >= first) & (places < end))[:, None], x, 0)
            y = jax.lax.dynamic_slice(g, (start, 0), (size, shape[1]))
            return jnp.einsum("mi,mo->io", x, y, preferred_element_type=wide)

        def rest(size: int, first: Int[Array, ""]) -> Array:
            if size == 0:
                return jnp.zeros(shape, wide)
            return product(size, jnp.minimum(first, len(rows) - size), first)

        first = end - (end - at) % large
        total = _smallest(rest, end - first, len(rows), first)
        total = jax.lax.fori_loop(
            0, (end - at) // large, lambda i, total: total + product(large, at + i * large), total
        )
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), expert, 0)

    return _runs(run, sizes, jnp.zeros((len(sizes), *shape), rows.dtype))


def _runs(run: Callable[..., Array], sizes: Sizes, out: Array) -> Array:
    """Goes over the runs that have rows, the first ones first."""
    ends = jnp.cumsum(sizes)
    used = jnp.argsort(sizes == 0, stable=True)  # matrices without rows are not even read

    def one(place: Int[Array, ""], out: Array) -> Array:
        expert = used[place]
        return run(expert, ends[expert] - sizes[expert], ends[expert], out)

    return jax.lax.fori_loop(0, jnp.sum(sizes > 0), one, out)


def _blocks(rows: int) -> list[int]:
    """Sizes of blocks of so many rows, the largest last."""
    return sorted({min(size, rows) for size in _BLOCKS})


def _smallest(block: Callable[..., Array], left: Int[Array, ""], rows: int, *args: Any) -> Array:
    """`block` of the smallest size that holds what is left; of 0 where that is nothing."""
    sizes = [0, *_blocks(rows)]
    ways = [functools.partial(block, size) for size in sizes]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), left), ways, *args)
