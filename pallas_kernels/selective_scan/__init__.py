"""The selective scan of Mamba, forward and backward, on TPU and Hopper, in either direction.

    h_t = exp(e_t A) h_{t-1} + dt_t B_t u_t,    y_t = C_t h_t            Gu and Dao 2023, section 3.2

Each of I channels has a state of S numbers. e is dt, or where tokens were left out the time since the last
one. States never are in global memory: a program has some channels and goes along the sequence, chunk after
chunk, with their state at hand. The backward pass finds the states before each chunk by one more such pass,
keeps those alone, and computes the states inside a chunk again from there: memory grows with the number of
chunks, by S / chunk of an input.

A state before the first token goes in and the one behind the last comes out, so that a prompt may be read in
pieces and a sequence continued. A single token is elementwise: XLA fuses that into one pass over the state,
which is all there is to gain, so without a name it is left to XLA.

What stands around it, D u and the gate, is elementwise too and fused by XLA with what comes next.

"Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, section 3.3.2; looking
both ways: "Vision Mamba", Zhu et al. 2024, arXiv:2401.09417, algorithm 1.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.op import Implementation, Interpret, Op, Unsupported
from pallas_kernels.selective_scan import cost, gpu, reference, tpu

DTYPES = ("float32", "bfloat16", "float16")
# A time over which every state decays to nothing, times any rate.
FOREVER = 1e30

OP = Op(
    name="selective_scan",
    reference=reference.selective_scan,
    gpu=gpu.forward,
    tpu=tpu.forward,
    tpu_backward=tpu.backward,
    cost=cost.forward,
)


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    hidden: jax.Array | None = None,
    decay: jax.Array | None = None,
    first: jax.Array | None = None,
    *,
    reverse: bool = False,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs and the last state of a selective state space.

    Args:
      u: `[B, N, I]` inputs.
      dt: `[B, N, I]` step sizes, positive; a token with step size 0 leaves the state as it is.
      A: `[I, S]` rates, negative.
      B: `[B, N, S]` what each token writes.
      C: `[B, N, S]` what each token reads.
      hidden: `[B, I, S]` state before the token that is read first; None is an empty one.
      decay: `[B, N, I]` e above; None means dt.
      first: `[B, N]` bool, tokens before which the state is emptied.
      reverse: whether the last token is read first.
      implementation: `reference`, `gpu`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[B, N, I]` outputs in the type of u, and the `[B, I, S]` state after the token that is read last, in
      float32.

    Raises:
      Unsupported: for shapes that do not fit together or types that no implementation takes, and for what the
        named implementation does not take.
    """
    arrays: dict[str, jax.Array | None] = dict(u=u, dt=dt, A=A, B=B, C=C, hidden=hidden, decay=decay)
    _check(u, A, arrays, first)
    if first is not None:
        since = (dt if decay is None else decay).astype(jnp.float32)
        arrays["decay"] = jnp.where(first[:, :, None], FOREVER, since)
    if u.shape[1] == 1 and implementation is None:
        implementation = "reference"
    return OP(
        *arrays.values(),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        reverse=reverse,
    )


def _check(u: jax.Array, A: jax.Array, arrays: dict[str, jax.Array | None], first: jax.Array | None) -> None:
    if u.ndim != 3 or A.ndim != 2 or A.shape[0] != u.shape[-1]:
        raise Unsupported(f"selective_scan takes u [B, N, I] and A [I, S], not {u.shape} and {A.shape}.")
    (batch, length, inner), state = u.shape, A.shape[1]
    if 0 in (*u.shape, state):
        raise Unsupported(
            f"selective_scan needs at least one token, channel and state: {u.shape}, {A.shape}."
        )
    whole, chosen = (batch, length, inner), (batch, length, state)
    wanted = dict(dt=whole, B=chosen, C=chosen, hidden=(batch, inner, state), decay=whole)
    for name, shape in wanted.items():
        array = arrays[name]
        if array is not None and array.shape != shape:
            raise Unsupported(
                f"selective_scan: {name} {list(array.shape)} must be {list(shape)}, beside u {list(u.shape)}"
                f" and A {list(A.shape)}."
            )
    for name, array in arrays.items():
        if array is not None and array.dtype.name not in DTYPES:
            raise Unsupported(f"selective_scan takes {', '.join(DTYPES)}, and {name} is {array.dtype}.")
    if first is not None and (first.shape != (batch, length) or first.dtype != jnp.bool_):
        raise Unsupported(
            f"selective_scan: first {first.dtype}{list(first.shape)} must be bool{[batch, length]}."
        )
