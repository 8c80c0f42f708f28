"""The gated perceptron of a token that is decoded, which reads the rows of active neurons alone, on TPU.

    y = sum_{f: g_f != 0} g_f (x . expand_f) contract_f

A single token takes the time of reading weights. What the gate leaves out need not be read: how many neurons
are active is counted at run time, from none to all, and there is no budget to exceed.

CATS: Lee et al., COLM 2024, arXiv:2404.08763, section 4, whose kernel for GPUs keeps the dense layout. Spark:
You et al., NeurIPS 2025, arXiv:2506.06644.

Only forward: nobody differentiates decoding. Where it is differentiated after all, the specification is.
"""

import jax

from pallas_kernels.op import Implementation, Interpret, Op, Unsupported
from pallas_kernels.sparse_ffn import cost, reference, tpu

__all__ = ["OP", "sparse_ffn"]

DTYPES = ("float32", "bfloat16", "float16")

OP = Op(name="sparse_ffn", reference=reference.sparse_ffn, tpu=tpu.forward, cost=cost.forward)


def sparse_ffn(
    gate: jax.Array,
    x: jax.Array,
    expand: jax.Array,
    contract: jax.Array,
    *,
    active: int | None = None,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """The sum over the neurons whose gate is not zero.

    Args:
      gate: `[F]`, of each neuron.
      x: `[V]`, what values are made of, in the type of the gate.
      expand: `[F, V]`, a row a neuron. What rows hold that are not active does not matter as long as it is
        finite.
      contract: `[F, C]`, likewise, in the same type.
      active: about how many neurons are active, None for all. The compiler is told so, and no result depends
        on it.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[C]`, in the type of x; sums are float32.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    _check(gate, x, expand, contract, active)
    return OP(
        *(gate, x, expand, contract),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        active=active,
    )


def _check(gate: jax.Array, x: jax.Array, expand: jax.Array, contract: jax.Array, active: int | None) -> None:
    shapes = f"gate {gate.shape}, x {x.shape}, expand {expand.shape} and contract {contract.shape}"
    ranks = (gate.ndim, x.ndim, expand.ndim, contract.ndim)
    if ranks != (1, 1, 2, 2) or 0 in (*gate.shape, *x.shape, *contract.shape):
        raise Unsupported(
            "sparse_ffn takes one token: gate [F], x [V], expand [F, V] and contract [F, C] of at least one,"
            f" not {shapes}."
        )
    if expand.shape != (*gate.shape, *x.shape) or contract.shape[0] != gate.shape[0]:
        raise Unsupported(f"sparse_ffn: {shapes} do not fit: matrices have a row for each of the gates.")
    for of, (a, b) in (("gate and x", (gate, x)), ("expand and contract", (expand, contract))):
        if a.dtype != b.dtype or a.dtype.name not in DTYPES:
            raise Unsupported(
                f"sparse_ffn takes {of} of one type, {', '.join(DTYPES)}, not {a.dtype} and {b.dtype}."
            )
    if active is not None and active < 0:
        raise Unsupported(f"sparse_ffn: active={active}: give a number of neurons, or None for all.")
