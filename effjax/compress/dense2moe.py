"""Dense2MoE: the FFNs of a trained diffusion transformer become mixtures of experts made of their neurons.

    I_f = E |sum_n a_nf dL/da_nf| = E |sum_c W_fc dL/dW_fc|       of hidden neuron f, W the second matrix
    y = MLP_shared(x) + sum_{e in T} g_e MLP_e(x) + b

The neurons that count most, by the first-order change of the loss without them, are the shared expert, which
sees every token; the others are dealt out one by one, so that every routed expert has its share of the more
and the less important. All experts with g = 1 are the dense FFN. Of a dense expansion of 4 the paper's shared
expert has 1 and twelve others 0.25 each; two of these are active: (1 + 2/4) / 4 = 37.5% of the FFN's
parameters, 62.5% less.

Here g_e = chosen p_e / sum_{T} p, which is 1 for a router that prefers none. The paper leaves it open.

    x <- B_j(x) for the `chosen` blocks j of a group           see `effjax.models.blocks.mixture`

Then blocks are put in groups, of which each example runs some. Both steps are followed by distillation, the
task `dense2moe`, whose teacher is the network before.

Source: Zheng et al., "Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image
Generation", ICCV 2025; its code is not published. Of the paper the reviews that quote its sizes and formulas
were read, not the text.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effjax.errors import UsageError
from effjax.ffn.mixture import Mixture
from effjax.ffn.mlp import MLP
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.blocks.mixture import MixtureOfBlocks
from effjax.models.blocks.several import copied
from effjax.models.dit import DiT

Params = Mapping[str, Any]


def importance(
    loss: Callable[[Params, Any], Float[Array, ""]], params: Params, batches: Iterable[Any]
) -> Float[Array, "depth hidden"]:
    """I: how much the loss would change, to first order, without each hidden neuron of each layer.

    Args:
      loss: of the parameters of a DiT and a calibration batch.
      params: of the DiT.
      batches: calibration batches, over which absolute values are averaged.
    """

    @jax.jit
    def of_batch(batch: Any) -> Float[Array, "depth hidden"]:
        kernel = params["blocks"]["ffn"]["contract"]["kernel"]  # [depth, F, C]

        def at(kernel: Array) -> Float[Array, ""]:
            ffn = params["blocks"]["ffn"]
            changed = {**ffn, "contract": {**ffn["contract"], "kernel": kernel}}
            return loss({**params, "blocks": {**params["blocks"], "ffn": changed}}, batch)

        return jnp.abs(jnp.sum(kernel * jax.grad(at)(kernel), axis=-1))

    each = [of_batch(batch) for batch in batches]
    if not each:
        raise UsageError("importance is measured on batches: give at least one.")
    return jnp.mean(jnp.stack(each), axis=0)


def magnitude(params: Params) -> Float[Array, "depth hidden"]:
    """|w_f| |v_f|, the norms of what leads into each hidden neuron and out of it: scores without data."""
    ffn = params["blocks"]["ffn"]
    into = jnp.linalg.norm(ffn["expand"]["kernel"], axis=1)  # [depth, F]
    return into * jnp.linalg.norm(ffn["contract"]["kernel"], axis=2)


def mixture_of(ffn: MLP, width: int, experts: int = 12, chosen: int = 2, shared: float = 0.25) -> Mixture:
    """The definition whose experts together have the neurons of a perceptron.

    Args:
      ffn: the dense one.
      width: of its input.
      experts: routed ones.
      chosen: how many of them a token is sent to.
      shared: share of the neurons that are the shared expert.

    Raises:
      UsageError: where the other neurons are not as many for every expert.
    """
    hidden = ffn.hidden or round(width * ffn.ratio)
    common = round(hidden * shared)
    if not 0 < common < hidden or (hidden - common) % experts:
        raise UsageError(
            f"{hidden} hidden neurons with {common} of them shared cannot be dealt out to experts={experts}: "
            f"each needs as many."
        )
    return Mixture(
        experts=experts,
        chosen=chosen,
        hidden=(hidden - common) // experts,
        activation=ffn.activation,
        shared=common,
        gated=False,
        use_bias=ffn.use_bias,
        scale=float(chosen),
        balance=0.01,
    )


def active_share(ffn: Mixture) -> float:
    """Neurons that a token meets, over all."""
    return (ffn.shared + ffn.chosen * ffn.hidden) / (ffn.shared + ffn.experts * ffn.hidden)


def to_experts(
    model: DiT,
    params: Params,
    scores: Float[Array, "depth hidden"],
    key: PRNGKeyArray,
    experts: int = 12,
    chosen: int = 2,
    shared: float = 0.25,
) -> tuple[DiT, dict[str, Any]]:
    """Returns the network with mixtures in the place of its FFNs, and its parameters.

    Args:
      model: a plain DiT with perceptrons.
      params: of it.
      scores: how much every hidden neuron counts: `importance`, or another.
      key: draws the routers.
      experts, chosen, shared: as in `mixture_of`.

    Raises:
      UsageError: for other blocks, and as `mixture_of`.
    """
    block, dense = _perceptrons(model)
    ffn = mixture_of(dense, model.dim, experts, chosen, shared)
    held = params["blocks"]["ffn"]
    order = jnp.argsort(-scores, axis=1)  # [depth, F], the most important first
    first, rest = order[:, : ffn.shared], order[:, ffn.shared :]
    dealt = jnp.swapaxes(rest.reshape(len(order), ffn.hidden, experts), 1, 2)  # [depth, E, F']
    made = {
        "shared": _taken(held, first),
        "expand_kernel": jnp.stack(
            [_columns(held["expand"]["kernel"], dealt[:, e]) for e in range(experts)], 1
        ),
        "contract_kernel": jnp.stack(
            [_rows(held["contract"]["kernel"], dealt[:, e]) for e in range(experts)], 1
        ),
        "router": {"kernel": 0.02 * jax.random.normal(key, (len(order), model.dim, experts))},
    }
    if dense.use_bias:
        made["expand_bias"] = jnp.take_along_axis(
            held["expand"]["bias"], dealt.reshape(len(order), -1), axis=1
        ).reshape(dealt.shape)
    blocks = {**params["blocks"], "ffn": made}
    return model.clone(block=block.clone(ffn=ffn)), {**params, "blocks": blocks}


def to_groups(
    model: DiT, params: Params, size: int, chosen: int, key: PRNGKeyArray, balance: float = 0.01
) -> tuple[DiT, dict[str, Any]]:
    """Returns the network with every `size` blocks as a mixture of blocks, and its parameters.

    Args:
      model: a DiT of single blocks, all told the same condition.
      params: of it.
      size: blocks of a group.
      chosen: how many of them run.
      key: draws the routers.
      balance: weight of the loss that keeps blocks in even use.

    Raises:
      UsageError: for groups that do not tile the depth, or other blocks.
    """
    if not isinstance(model.block, DiTBlock) or model.condition != "shared":
        raise UsageError("groups are made of DiT's own blocks, with condition='shared'.")
    if size < 1 or model.depth % size:
        raise UsageError(f"{model.depth} blocks make no groups of {size}: choose a divisor.")
    group = MixtureOfBlocks(tuple(copied(model.block) for _ in range(size)), chosen=chosen, balance=balance)
    groups = model.depth // size
    router = {
        "kernel": 0.02 * jax.random.normal(key, (groups, model.dim, size)),
        "bias": jnp.zeros((groups, size)),
    }
    held = params["blocks"]
    dealt = {f"members_{j}": jax.tree.map(lambda leaf: leaf[j::size], held) for j in range(size)}  # noqa: B023
    blocks = {**dealt, "router": router}
    return model.clone(block=group, depth=groups), {**params, "blocks": blocks}


def pruned(
    model: DiT, params: Params, scores: Float[Array, "depth hidden"], hidden: int
) -> tuple[DiT, dict[str, Any]]:
    """Returns the network with the `hidden` best neurons of every FFN alone, and its parameters."""
    block, _ = _perceptrons(model)
    if not 0 < hidden <= scores.shape[1]:
        raise UsageError(f"hidden={hidden}: keep from 1 to all {scores.shape[1]} neurons.")
    best = jnp.argsort(-scores, axis=1)[:, :hidden]
    blocks = {**params["blocks"], "ffn": _taken(params["blocks"]["ffn"], best)}
    return model.clone(block=block.clone(ffn=block.ffn.clone(hidden=hidden))), {**params, "blocks": blocks}


def _perceptrons(model: DiT) -> tuple[DiTBlock, MLP]:
    block = model.block
    if not isinstance(block, DiTBlock) or not isinstance(block.ffn, MLP):
        raise UsageError("experts are made of the perceptrons of DiT's own block.")
    return block, block.ffn


def _taken(ffn: Params, neurons: Int[Array, "depth f"]) -> dict[str, Any]:
    """A perceptron of some hidden neurons of one, and its output bias."""
    expand, contract = ffn["expand"], ffn["contract"]
    taken: dict[str, Any] = {
        "expand": {"kernel": _columns(expand["kernel"], neurons)},
        "contract": {**contract, "kernel": _rows(contract["kernel"], neurons)},
    }
    if "bias" in expand:
        taken["expand"]["bias"] = jnp.take_along_axis(expand["bias"], neurons, axis=1)
    return taken


def _columns(kernel: Float[Array, "depth c h"], neurons: Int[Array, "depth f"]) -> Float[Array, "depth c f"]:
    return jnp.take_along_axis(kernel, neurons[:, None], axis=2)


def _rows(kernel: Float[Array, "depth h c"], neurons: Int[Array, "depth f"]) -> Float[Array, "depth f c"]:
    return jnp.take_along_axis(kernel, neurons[:, :, None], axis=1)
