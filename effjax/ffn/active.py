"""A gated perceptron of whose neurons only a few count for each token, and its step that reads only those.

    g = sparse(u W_gate),   y = (g * (v W_expand)) W_contract              u, v: parts of the token x

Where most entries of g are zero, a zero says that column f of W_expand and row f of W_contract need not be
read. That saves time where a single token is decoded, as there the time goes into reading weights. Two forms
of one function:

    masked      all products are computed; matrices are stored as in `effjax.ffn.gated`
    by rows     every matrix has a row a neuron, `[F, C]`, so that a neuron's weights lie side by side; of a
                single token the rows with g != 0 are fetched in blocks of `BLOCK`, as many as there are:

                y = sum_{f: g_f != 0} g_f (v . expand_f) contract_f

The step by rows is done in one of three ways, `implementation`:

    plain        in the loop over blocks that stands here, on every platform
    kernel       by `pallas_kernels.sparse_ffn` on a TPU; elsewhere, and with a warning for what it does not
                 take, by the reference
    reference    by the specification of the kernel: all products, on every platform

There is no budget of active neurons to exceed: the number of blocks is counted at run time, from 0 to all,
and only the shape of a block is static. With many neurons active the step becomes as slow as the dense one,
and never wrong.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense, named, xavier
from effjax.parallel.each_device import on_each_device

# Rows fetched at once: of 2048 float32 channels a megabyte, which a core's cache holds until multiplied.
BLOCK = 128

Sparse = Callable[[Float[Array, "*batch f"]], Float[Array, "*batch f"]]

Implementation = Literal["plain", "kernel", "reference"]


class Rows(nn.Module):
    """The matrix of a projection, stored with a row a neuron.

    Attributes:
      neurons: how many rows.
    """

    neurons: int

    @nn.compact
    def __call__(self, width: int) -> Float[Array, "f c"]:
        """Returns the matrix for vectors of so many channels."""
        return jnp.asarray(
            self.param("kernel", named(xavier, ("mlp", "embed")), (self.neurons, width), jnp.float32)
        )


def perceptron(
    first: Float[Array, "*batch u"],
    second: Float[Array, "*batch v"],
    sparse: Sparse,
    *,
    hidden: int,
    width: int,
    by_rows: bool,
    train: bool,
    implementation: Implementation = "plain",
    active: int | None = None,
) -> Float[Array, "*batch c"]:
    """The equation above, with the layers `gate`, `expand` and `contract` of the module that calls it.

    Args:
      first: what the gate sees.
      second: what the values are made of.
      sparse: from the gate's products to a gate that is zero for most neurons.
      hidden: number of neurons.
      width: of the output.
      by_rows: how matrices are stored.
      train: whether gradients are wanted, which the step that reads few rows has none of.
      implementation: of the step that reads few rows.
      active: about how many neurons are, which a kernel's compiler is told; None where nobody knows.

    Raises:
      UsageError: for an implementation of what is not stored by rows.
    """
    if implementation != "plain" and not by_rows:
        raise UsageError(
            f"implementation={implementation!r} reads the rows of single neurons: store them with"
            " by_rows=True, as effjax.compress.rows does."
        )
    if not by_rows:
        gate = sparse(Dense(hidden, ("embed", "mlp"), use_bias=False, name="gate")(first))  # [..., F]
        value = Dense(hidden, ("embed", "mlp"), use_bias=False, name="expand")(second)  # [..., F]
        h = constrain(gate * value, "mlp")
        return Dense(width, ("mlp", "embed"), use_bias=False, name="contract")(h)  # [..., C]
    of_gate = Rows(hidden, name="gate")(first.shape[-1])  # [F, U]
    expand = Rows(hidden, name="expand")(second.shape[-1])  # [F, V]
    contract = Rows(hidden, name="contract")(width)  # [F, C]
    gate = sparse(_by_row(first, of_gate))  # [..., F]
    if gate.size == hidden and not train:
        arrays = (gate.reshape(-1), second.reshape(-1), expand, contract)
        y = active_sum(*arrays) if implementation == "plain" else _by_kernel(*arrays, implementation, active)
        return y.reshape(*gate.shape[:-1], width)
    h = constrain(gate * _by_row(second, expand), "mlp")
    return jnp.matmul(*nn.dtypes.promote_dtype(h, contract))  # [..., C]


def active_sum(
    gate: Float[Array, " f"],
    x: Float[Array, " v"],
    expand: Float[Array, "f v"],
    contract: Float[Array, "f c"],
) -> Float[Array, " c"]:
    """sum_f g_f (x . expand_f) contract_f over the neurons with g_f != 0, whose rows alone are read.

    Sums are float32 at least. The time grows with the number of active neurons, a block of them at a time.
    """
    neurons = gate.shape[0]
    dtype = jnp.result_type(gate, x, expand, contract)
    wide = jnp.promote_types(dtype, jnp.float32)
    active = gate != 0
    count = jnp.sum(active)
    # Behind the active ones stands a number that no neuron has.
    index = jnp.nonzero(active, size=neurons + BLOCK, fill_value=neurons)[0]
    x = x.astype(wide)

    def add(block: Array, y: Float[Array, " c"]) -> Float[Array, " c"]:
        # Tied to the counter, the matrices are not converted to float32 as a whole before the loop, as XLA
        # would do for types that a CPU does not compute in.
        up, down, block = jax.lax.optimization_barrier((expand, contract, block))
        at = jax.lax.dynamic_slice(index, (block * BLOCK,), (BLOCK,))
        g = jnp.where(at < neurons, jnp.take(gate, at, mode="clip"), 0).astype(wide)
        value = _fetched(up, at, wide) @ x  # [BLOCK]
        return y + (g * value) @ _fetched(down, at, wide)

    blocks = (count + BLOCK - 1) // BLOCK
    y = jax.lax.fori_loop(0, blocks, add, jnp.zeros(contract.shape[1], wide))
    return y.astype(dtype)


def _by_kernel(
    gate: Float[Array, " f"],
    x: Float[Array, " v"],
    expand: Float[Array, "f v"],
    contract: Float[Array, "f c"],
    implementation: Implementation,
    active: int | None,
) -> Float[Array, " c"]:
    """The same sum by the kernel or its specification, whole on each device."""
    # Pallas is slow to import, and most programs have no use for it.
    from pallas_kernels.sparse_ffn import sparse_ffn

    def step(*arrays: Any) -> Any:
        named: Any = "reference" if implementation == "reference" else None
        return sparse_ffn(*arrays, active=active, implementation=named)

    gate, x = (array.astype(jnp.result_type(gate, x, expand, contract)) for array in (gate, x))
    expand, contract = nn.dtypes.promote_dtype(expand, contract)
    whole = ((None,), (None,), (None, None), (None, None))
    return on_each_device(step, whole, (None,))(gate, x, expand, contract)


def _fetched(matrix: Float[Array, "f c"], at: Array, dtype: jnp.dtype) -> Float[Array, "b c"]:
    """Some rows in another type; the barriers keep fetching, converting and multiplying three loops."""
    rows = jax.lax.optimization_barrier(jnp.take(matrix, at, axis=0, mode="clip"))
    return jax.lax.optimization_barrier(rows.astype(dtype))


def _by_row(x: Float[Array, "*batch c"], matrix: Float[Array, "f c"]) -> Float[Array, "*batch f"]:
    """x . row of every neuron."""
    x, matrix = nn.dtypes.promote_dtype(x, matrix)
    return jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())))
