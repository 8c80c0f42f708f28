"""MoDeGPT: layers made narrower in closed form, each module by what suits it; nothing is trained.

    hidden   feed-forward     Nystrom: units stay by ridge leverage scores, outgoing weights are refitted
    qk       queries, keys    CR: channels stay by the product of their norms
    value    values, output   SVD in the metric of what enters: new factors of every head

    layer l loses phi_l = L phi softmax(-s / epsilon)_l,   s_l = 1 - E cos(x_l, x_l+1),   at most all

See `effjax.compress.structure.modules` for the decompositions. Statistics are of what enters the kernels, so
that norms, modulations, activations and gates are in them; one pass of the whole network gives all. What is
left is an ordinary network with narrower layers.

Biases of queries, keys and hidden units stay with their channel. Rows of attention sum to 1, so a value bias
gives the output a constant, and hidden units have a mean: where the layer that closes a module has a bias,
means go through it exactly and what is fitted is the covariance. Where it has none, the value bias is one
more row of the value matrix.

Grouped queries: a key's channels count for all queries that it serves, and the outputs of these stand side by
side as one matrix. Heads that are turned lose pairs of channels, the same in every head of a layer: a pair is
worth its norm, which turning does not change, summed over heads.

Source: Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression", ICLR 2025,
arXiv:2408.09632. There heads keep pairs of their own, and biases are not refitted.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from effjax.compress.blocks import evaluated
from effjax.compress.steps.inputs import check_finite
from effjax.compress.structure import modules
from effjax.compress.structure.choose import Least
from effjax.compress.structure.cost import LayerCost, costs, macs
from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.structure.modules import Moments
from effjax.compress.structure.units import apart, channels, keep, sizes
from effjax.compress.subject import Batch, Calibration, Subject
from effjax.compress.watch import Watched, watch
from effjax.errors import UsageError
from effjax.layers.stack import layer_name
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.blocks.metaformer import Block
from effjax.models.lm import DecoderBlock
from effjax.models.pyramid import Pyramid

Narrow = Literal["qk", "value", "hidden"]

# What enters queries, keys and values is one and the same.
_ENTERED = {"qk": "mixer/value/kernel", "value": "mixer/value/kernel", "hidden": "ffn/contract/kernel"}


@dataclasses.dataclass(frozen=True)
class MoDeGPT:
    """Makes all layers narrower at once.

    Attributes:
      left: share of the multiply-accumulates that is left; no more are, and fewer only by less than a unit.
      kinds: what may go: channels of queries and keys, channels of values, hidden units.
      batches: of training data, that statistics are of.
      epsilon: how evenly layers lose, whatever their influence; infinity takes the same share of all.
      ridge: of the leverage scores, beside sums over all tokens.
      in_turn: whether hidden units go one by one and are scored again, or all at once.
      least: what every layer keeps, and how many units go together.
    """

    left: float = 0.7
    kinds: tuple[Narrow, ...] = ("qk", "value", "hidden")
    batches: int = 32
    epsilon: float = 0.1
    ridge: float = 1.0
    in_turn: bool = False
    least: Least = dataclasses.field(default_factory=Least)

    def __post_init__(self) -> None:
        if not 0 < self.left <= 1 or not self.kinds:
            raise UsageError(
                f"left={self.left} is a share above 0 and at most 1, and kinds={self.kinds} names what may "
                f"go."
            )
        if self.batches < 1 or not self.epsilon > 0 or not self.ridge > 0:
            raise UsageError(
                f"batches={self.batches} is at least 1, epsilon={self.epsilon} and ridge={self.ridge} above "
                f"0."
            )

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Decomposes.

        Raises:
          UsageError: for a network whose layers cannot be taken apart or followed, a budget that cannot be
            met, values that are clipped, or what is not finite.
        """
        if isinstance(subject.model, Pyramid):
            raise UsageError("the layers of a pyramid are not followed one by one: kind='prune' narrows it.")
        layers = take_apart(subject)
        found = {(at, kind) for at, layer in enumerate(layers) for kind in self.kinds if _has(layer, kind)}
        if not found:
            raise UsageError(f"no layer has any of {', '.join(self.kinds)} to lose.")
        for at, kind in sorted(found):
            if kind == "value" and layers[at].block.mixer.clip is not None:  # type: ignore[attr-defined]
                raise UsageError("values are clipped channel by channel: leave 'value' out of kinds.")
        influence, entered = _followed(subject, layers, found, calibration.first(self.batches))
        prices = costs(subject, layers)
        left = self.widths(layers, prices, influence)
        made = []
        for at, layer in enumerate(layers):
            told = " ".join(f"{kind} {left[at][kind]} of {_has(layer, kind)}" for kind in left[at])
            calibration.report(f"{layer.where}: influence {influence[at]:.4f}, keeps {told}.")
            made.append(self._narrowed(layer, left[at], {kind: entered.get((at, kind)) for kind in left[at]}))
        small = put_together(subject, made)
        calibration.report(f"{macs(small) / macs(subject):.4f} of the MACs left.")
        return small

    def widths(
        self, layers: Sequence[Layer], prices: Sequence[LayerCost], influence: Float[np.ndarray, " l"]
    ) -> list[dict[Narrow, int]]:
        """How many units of each kind every layer keeps.

        Args:
          layers: of the network.
          prices: of the layers.
          influence: of the layers.

        Raises:
          UsageError: for a budget that cannot be met.
        """
        whole = sum(price.of(sizes(layer)) for price, layer in zip(prices, layers, strict=True))
        options = [[_option(layer, price, kind, self.least) for kind in self.kinds if _has(layer, kind)]
                   for layer, price in zip(layers, prices, strict=True)]  # fmt: skip
        cost = np.asarray([sum(each.cost for each in own) for own in options])
        most = np.asarray([sum(each.cost * each.most for each in own) for own in options])
        most = np.divide(most, cost, out=np.zeros_like(cost), where=cost > 0)
        mean = (1 - self.left) * whole / cost.sum() if cost.sum() else 0.0
        lost = modules.shares(mean, -influence / self.epsilon, cost, most)
        left: list[dict[Narrow, int]] = []
        rest, spent = [], whole
        for at, (share, own) in enumerate(zip(lost, options, strict=True)):
            both = np.asarray([each.cost for each in own]), np.asarray([each.most for each in own])
            each_loses = modules.shares(float(share), np.zeros(len(own)), *both) if own else np.zeros(0)
            left.append({})
            for each, loses in zip(own, each_loses, strict=True):
                wanted = each.units * (1 - loses)
                stays = each.down(wanted)
                left[at][each.kind] = stays
                spent -= each.price * (each.units - stays)
                rest.append((stays - wanted, at, each))
        # Whole steps: rounded down, and given back where most was taken, as far as the budget goes.
        for short, at, each in sorted(rest, key=lambda one: one[0] / one[2].step):
            more = each.up(left[at][each.kind])
            price = each.price * (more - left[at][each.kind])
            if short < -1e-9 and spent + price <= self.left * whole + 1e-6:
                left[at][each.kind] = more
                spent += price
        return left

    def _narrowed(
        self, layer: Layer, left: Mapping[Narrow, int], entered: Mapping[Narrow, Moments | None]
    ) -> Layer:
        """The layer with so many units of each kind."""
        for kind, count in left.items():
            if count == _has(layer, kind):
                continue
            known = entered[kind]
            if known is None:
                raise UsageError(f"nothing entered {layer.where}: no batch runs it.")
            if kind == "hidden":
                layer = _nystrom(layer, known, count, self.ridge, self.in_turn)
            else:
                layer = _channels(layer, known, count) if kind == "qk" else _factors(layer, known, count)
        return layer


def _nystrom(layer: Layer, entered: Moments, count: int, ridge: float, in_turn: bool) -> Layer:
    """Hidden units, and what is fitted to those that stay."""
    held = flatten_dict(layer.params, sep="/")
    kernel = np.asarray(held["ffn/contract/kernel"], np.float64)  # [F, C]
    constant = "ffn/contract/bias" in held
    square = entered.correlation(constant)  # [F, F]
    rows = modules.stay(square * entered.count, count, ridge, in_turn)
    fitted = modules.refitted(square, rows, kernel)  # [m, C]
    made = {"ffn/contract/kernel": fitted}
    if constant:
        bias = np.asarray(held["ffn/contract/bias"], np.float64)
        made["ffn/contract/bias"] = bias + entered.mean @ kernel - entered.mean[rows] @ fitted  # [C]
    return _with(keep(layer, "hidden", rows), made)


def _channels(layer: Layer, entered: Moments, count: int) -> Layer:
    """Channels of queries and keys."""
    held, units = flatten_dict(layer.params, sep="/"), channels(layer)
    energy = {}
    for name in ("query", "key"):
        heads = [_of_head(held, name, entered, head) for head in range(_heads(held, name))]
        each = np.stack([np.diag(head.square) for head in heads])  # [H, D]
        energy[name] = each[:, units].sum(-1)  # [H, units]
    scores = modules.product_scores(energy["query"], energy["key"])  # [G, units]
    if not apart(layer, "qk"):
        scores = scores.sum(0)  # [units]
    order = np.argsort(-scores, axis=-1, kind="stable")
    return keep(layer, "qk", np.sort(order[..., :count], axis=-1))


def _factors(layer: Layer, entered: Moments, rank: int) -> Layer:
    """Values and output of every head as new factors."""
    held = flatten_dict(layer.params, sep="/")
    value, output = (np.asarray(held[f"mixer/{name}/kernel"], np.float64) for name in ("value", "output"))
    constant = "mixer/output/bias" in held
    groups, serves, width = value.shape[1], output.shape[0] // value.shape[1], output.shape[-1]
    made: dict[str, list[Any]] = {"kernel": [], "bias": [], "output": []}
    more = np.zeros(width)
    for group in range(groups):
        known = _of_head(held, "value", entered, group)
        own = output[group * serves : (group + 1) * serves]  # [n, E, C]
        beside = own.transpose(1, 0, 2).reshape(own.shape[1], -1)  # [E, n C]
        first, second = modules.joined(known.correlation(constant), beside, rank)  # [E, k], [k, n C]
        made["kernel"].append(value[:, group] @ first)  # [C, k]
        if (bias := _bias(held, "value", group)) is not None:
            made["bias"].append(bias @ first)  # [k]
        made["output"].append(second.reshape(rank, serves, width).transpose(1, 0, 2))  # [n, k, C]
        lost = known.mean @ (beside - first @ second)  # [n C]
        more += lost.reshape(serves, width).sum(0)
    new = {
        "mixer/value/kernel": np.stack(made["kernel"], 1),  # [C, G, k]
        "mixer/output/kernel": np.concatenate(made["output"]),  # [H, k, C]
    }
    if made["bias"]:
        new["mixer/value/bias"] = np.stack(made["bias"])  # [G, k]
    if constant:
        new["mixer/output/bias"] = np.asarray(held["mixer/output/bias"], np.float64) + more
    rows = np.tile(np.arange(rank), (groups, 1))
    return _with(keep(layer, "value", rows), new)


def _heads(held: Mapping[str, Any], name: str) -> int:
    return int(held[f"mixer/{name}/kernel"].shape[1])


def _bias(held: Mapping[str, Any], name: str, head: int) -> np.ndarray | None:
    path = f"mixer/{name}/bias"
    return np.asarray(held[path][head], np.float64) if path in held else None


def _of_head(held: Mapping[str, Any], name: str, entered: Moments, head: int) -> Moments:
    """Moments of what a head has of queries, keys or values."""
    kernel = np.asarray(held[f"mixer/{name}/kernel"][:, head], np.float64)  # [C, D]
    return entered.through(kernel, _bias(held, name, head))


def _with(layer: Layer, new: Mapping[str, np.ndarray]) -> Layer:
    """The layer with other numbers, as exact as those that it had."""
    flat = dict(flatten_dict(layer.params, sep="/"))
    flat |= {path: jnp.asarray(value, flat[path].dtype) for path, value in new.items()}
    return dataclasses.replace(layer, variables={**layer.variables, "params": unflatten_dict(flat, sep="/")})


@dataclasses.dataclass(frozen=True)
class _Option:
    """A kind of units of a layer: how many, how many stay at least and go together, what each costs."""

    kind: Narrow
    units: int
    least: int
    step: int
    price: float

    @property
    def cost(self) -> float:
        return self.price * self.units

    @property
    def most(self) -> float:
        """The share that can go."""
        return 1 - self.least / self.units

    def down(self, wanted: float) -> int:
        """The most whole steps that are no more than wanted."""
        if wanted > self.units - 1e-9:
            return self.units
        return max(math.floor((wanted + 1e-9) / self.step) * self.step, self.least)

    def up(self, count: int) -> int:
        """A step more."""
        return min(count + self.step, self.units)


def _option(layer: Layer, price: LayerCost, kind: Narrow, least: Least) -> _Option:
    has, step = sizes(layer), least.step(kind)
    units = getattr(has, kind)
    lowest = min(math.ceil(max(getattr(least, kind), 1) / step) * step, units)
    return _Option(kind, units, lowest, step, price.of_unit(kind, has))


def _has(layer: Layer, kind: str) -> int:
    return int(getattr(sizes(layer), kind))


def _followed(
    subject: Subject, layers: Sequence[Layer], wanted: set[tuple[int, Narrow]], batches: Sequence[Batch]
) -> tuple[Float[np.ndarray, " l"], dict[tuple[int, Narrow], Moments]]:
    """The influence of every layer, and moments of what enters its modules.

    A layer with nothing to lose has no influence that anybody asks for.
    """
    listed = bool(subject.model.layer_blocks)
    start = lambda at: f"blocks/{layer_name(at)}/" if listed else "blocks/"  # noqa: E731
    paths = {(at, kind): start(at) + _ENTERED[kind] for at, kind in wanted}
    places = {path: place for path, place in subject.places().items() if path in set(paths.values())}
    alike: dict[int, list[tuple[float, int]]] = {at: [] for at in range(len(layers))}

    def tell(path: str, row: Any, cosine: Any, count: int) -> None:
        at = int(path.split("/")[1].removeprefix(layer_name(0)[:-1])) if listed else int(row)
        alike[at].append((float(cosine), count))

    def follow(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        made = call(*args, **kwargs)
        module = context.module
        if isinstance(module, Block | DiTBlock | DecoderBlock) and context.method_name == "__call__":
            held = jax.tree.leaves(module.variables["params"], is_leaf=lambda x: isinstance(x, Watched))
            mark = next((leaf for leaf in held if isinstance(leaf, Watched)), None)
            if mark is not None:
                cosine = _cosine(args[0], made[0])
                jax.debug.callback(
                    lambda row, value, path=mark.path, n=cosine.size: tell(path, row, value, n),
                    mark.layer,
                    jnp.mean(cosine),
                )
        return made

    with nn.intercept_methods(follow):
        seen = watch(subject, places, map(evaluated, batches), _summary, _added)
    check_finite(seen, lambda told: bool(np.isfinite(told["square"]).all()))
    influence = np.zeros(len(layers))
    for at, told in alike.items():
        if told:
            cosines, counts = np.asarray(told, np.float64).T
            influence[at] = 1 - float(np.average(cosines, weights=counts))
    found = {}
    for (at, kind), path in paths.items():
        told = seen[path][0 if listed else at]
        if told is not None:
            count = float(told["count"])
            parts = (np.asarray(told[name], np.float64) / count for name in ("sum", "square"))
            found[at, kind] = Moments(count, *parts)
    return influence, found


def _cosine(before: Any, after: Any) -> Float[Array, " n"]:
    """Of every token, before a layer and behind it."""
    if not isinstance(before, jax.Array) or before.shape != after.shape:
        raise UsageError("layers that change which tokens there are cannot be followed: leave `tokens` out.")
    a, b = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (before, after))  # [N, C]
    sizes = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)  # [N]
    return jnp.sum(a * b, axis=-1) / jnp.maximum(sizes, 1e-30)


def _summary(x: Float[Array, "r k"]) -> dict[str, Array]:
    x = x.astype(jnp.float32)  # [R, K]
    square = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)  # [K, K]
    return {"count": jnp.asarray(x.shape[0]), "sum": jnp.sum(x, axis=0), "square": square}


def _added(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + b, old, new)
