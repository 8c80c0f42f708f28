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

# Rows of a block, and of those that take what is left of a run.
_BLOCKS = (256, 64)


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

    def run(expert: Int[Array, ""], at: Int[Array, ""], end: Int[Array, ""], out: Results) -> Results:
        kernel = jax.lax.dynamic_index_in_dim(kernels, expert, keepdims=False)

        def block(size: int, start: Int[Array, ""], mine: Array | None, out: Results) -> Results:
            x = jax.lax.dynamic_slice(rows, (start, 0), (size, inputs))
            y = jax.lax.dot_general(x, kernel, contracted)  # [block, O]
            if mine is not None:
                # Rows before the run keep what they have; those behind it are written again by theirs.
                before = jax.lax.dynamic_slice(out, (start, 0), (size, outputs))
                y = jnp.where(mine[:, None], y, before)
            return jax.lax.dynamic_update_slice(out, y, (start, 0))

        return _blocks(block, len(rows), at, end, out)

    return _runs(run, sizes, jnp.zeros((len(rows), outputs), rows.dtype))


def kernel_gradient(rows: Rows, g: Results, sizes: Sizes) -> Kernels:
    """The gradient of the matrices: of each, the products of the rows of its run."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    shape = rows.shape[1], g.shape[1]

    def run(expert: Int[Array, ""], at: Int[Array, ""], end: Int[Array, ""], out: Kernels) -> Kernels:
        def block(size: int, start: Int[Array, ""], mine: Array | None, total: Array) -> Array:
            x = jax.lax.dynamic_slice(rows, (start, 0), (size, shape[0]))
            if mine is not None:
                x = jnp.where(mine[:, None], x, 0)
            y = jax.lax.dynamic_slice(g, (start, 0), (size, shape[1]))
            return total + jnp.einsum("mi,mo->io", x, y, preferred_element_type=wide)

        total = _blocks(block, len(rows), at, end, jnp.zeros(shape, wide))
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


def _blocks(block: Callable[..., Any], rows: int, at: Int[Array, ""], end: Int[Array, ""], out: Any) -> Any:
    """Goes over the rows from `at` to `end`: large blocks while they fit, small ones over the rest.

    A small block may hold rows that are not of this run: behind it, and where the rows end, before it.
    """
    large, small = (min(size, rows) for size in _BLOCKS)
    fitting = (end - at) // large

    def whole(i: Int[Array, ""], out: Any) -> Any:
        return block(large, at + i * large, None, out)

    def rest(i: Int[Array, ""], out: Any) -> Any:
        first = at + fitting * large + i * small
        start = jnp.minimum(first, rows - small)
        places = start + jnp.arange(small)
        return block(small, start, (places >= first) & (places < end), out)

    out = jax.lax.fori_loop(0, fitting, whole, out)
    return jax.lax.fori_loop(0, (end - at - fitting * large + small - 1) // small, rest, out)
