"""What a layer can lose: heads, channels of its heads, hidden units. What all lose at once is in `stream`.

    heads    a key/value head with the query heads that it serves
    qk       a channel of queries and keys of every head; each head may keep others
    value    a channel of values, and of what a head gives, of every head; likewise
    hidden   a hidden unit of the feed-forward layer

Which numbers belong to a unit follows from the names of the axes of the parameters: a hidden unit is a column
of the matrices that expand, a row of the one that contracts, and a bias. A unit whose outgoing weights are
zero gives nothing, so that the network without it gives the same.

Heads that are turned by rotary positions lose pairs of channels, the same in every head; the definition then
lists whose frequencies are left. Where queries and keys are normed no channel stands for itself: they stay.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from effjax.compress.structure.layers import Layer
from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.layers.stored import Stored
from effjax.mixers.attention import Attention
from effjax.mixers.shifted_window import ShiftedWindow

# "stream" is of the network, see `effjax.compress.structure.stream`; the others are of a layer.
Kind = Literal["heads", "qk", "value", "hidden", "stream"]
KINDS: tuple[Kind, ...] = ("heads", "qk", "value", "hidden")

# The parameters of a mixer that a kind of unit has a part in, by the first name of their path in it.
_PARTS: dict[Kind, tuple[str, ...]] = {
    "qk": ("query", "key"),
    "value": ("value", "output"),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many units a layer has.

    Attributes:
      heads: key/value heads.
      qk: channels of queries and keys, or pairs of them, of a head.
      value: channels of the values of a head.
      hidden: hidden units.
      stream: channels of what it reads and adds to, where those may go.
    """

    heads: int = 0
    qk: int = 0
    value: int = 0
    hidden: int = 0
    stream: int = 0


def sizes(layer: Layer) -> Sizes:
    """What a layer has; 0 of what it has not, or cannot lose."""
    mixer, ffn = _mixer(layer), _ffn(layer)
    found: dict[str, int] = {}
    normed = getattr(mixer, "qk_norm", False)
    if mixer is not None and not (normed and mixer.qk_norm_over != "head"):
        shape = _leaves(layer)["mixer/key/kernel"].shape  # [C, G, D]
        found |= dict(heads=shape[1])
        if type(mixer) is Attention:
            some = mixer.rotary_dims is not None and not mixer.rotary_kept and mixer.rotary_dims < shape[2]
            if not normed and not (_turned(layer) and some):
                found |= dict(qk=shape[2] // 2 if _turned(layer) else shape[2])
            found |= dict(value=_leaves(layer)["mixer/value/kernel"].shape[2])
    if ffn is not None:
        found |= dict(hidden=_leaves(layer)["ffn/contract/kernel"].shape[0])
    return Sizes(**found)


def apart(layer: Layer, kind: Kind) -> bool:
    """Whether the heads of a layer may keep different units of a kind."""
    return kind == "value" or (kind == "qk" and not _turned(layer))


def channels(layer: Layer) -> np.ndarray:
    """`[units, 1]`, or `[units, 2]` of pairs: the channels of a head that units of "qk" are."""
    size = _leaves(layer)["mixer/key/kernel"].shape[2]
    return _pairs(_mixer(layer), size) if _turned(layer) else np.arange(size)[:, None]


def sums(layer: Layer, numbers: Any, kind: Kind) -> Float[Array, "*heads units"]:
    """Sums numbers of a layer, shaped as its parameters are, over everything that belongs to a unit.

    Args:
      layer: whose units.
      numbers: a tree like its parameters.
      kind: of units.

    Returns:
      `[units]`, or `[heads, units]` where heads may keep different ones.
    """
    flat, total = flatten_dict(numbers, sep="/"), None
    for path, axes in _members(layer, kind):
        found = _by_unit(layer, kind, flat[path], axes)
        total = found if total is None else total + found
    assert total is not None
    return total if kind not in ("qk", "value") or apart(layer, kind) else jnp.sum(total, axis=0)


def keep(layer: Layer, kind: Kind, units: Sequence[int] | np.ndarray) -> Layer:
    """The layer with these units alone, smaller by the others.

    Args:
      layer: to be cut.
      kind: of units.
      units: numbers, `[kept]`, or `[heads, kept]` where heads keep different ones.

    Raises:
      UsageError: for no units, or numbers that are not there.
    """
    chosen, count = np.asarray(units, np.int32), getattr(sizes(layer), kind)
    if not count:
        raise UsageError(f"{layer.where} has no {kind} that it could lose.")
    if chosen.size == 0:
        raise UsageError(f"{layer.where} would have no {kind} left: leave the branch out instead.")
    if chosen.min() < 0 or chosen.max() >= count:
        raise UsageError(f"{layer.where} has {count} {kind}, and no such as {chosen}.")
    flat = dict(flatten_dict(layer.params, sep="/"))
    for path, axes in _members(layer, kind):
        flat[path] = _taken(layer, kind, flat[path], axes, chosen)
    block = _narrowed(layer, kind, chosen)
    variables = {**layer.variables, "params": unflatten_dict(flat, sep="/")}
    return dataclasses.replace(layer, block=block, variables=variables)


def silence(layer: Layer, kind: Kind, units: Float[Array, "*heads units"] | np.ndarray) -> Any:
    """The parameters with outgoing weights multiplied: by 0 they are those of a network without the unit.

    Args:
      layer: whose.
      kind: "heads", "value" or "hidden"; without all of a head's queries and keys it still gives the mean.
      units: factors, as `sums` returns numbers.

    Raises:
      UsageError: for a kind whose units give nothing by themselves.
    """
    path = {"heads": "mixer/output/kernel", "value": "mixer/output/kernel", "hidden": "ffn/contract/kernel"}
    if kind not in path:
        raise UsageError(f"a unit of {kind} gives nothing by itself: no outgoing weight silences it.")
    flat = dict(flatten_dict(layer.params, sep="/"))
    kernel, factors = flat[path[kind]], jnp.asarray(units)
    if kind == "hidden":
        flat[path[kind]] = kernel * factors[:, None]  # [F, C]
    else:
        each = kernel.shape[0] // sizes(layer).heads
        factors = jnp.repeat(factors, each, axis=0)  # [H] or [H, E]
        flat[path[kind]] = kernel * factors.reshape(factors.shape + (1,) * (3 - factors.ndim))  # [H, E, C]
    return unflatten_dict(flat, sep="/")


def without(layer: Layer, branch: Literal["mixer", "ffn"]) -> Layer:
    """The layer without a branch, and without its norm and scale.

    Raises:
      UsageError: for a layer that has no such branch.
    """
    if getattr(layer.block, branch, None) is None:
        raise UsageError(f"{layer.where} has no {branch} to leave out.")
    changed: dict[str, Any] = {branch: None}
    block = layer.block.clone(**changed, parent=None, name=None)
    gone = (branch, f"{branch}_norm", f"{branch}_scale", f"{branch}_norm_after")
    variables = {
        name: {key: value for key, value in tree.items() if key not in gone}
        for name, tree in layer.variables.items()
    }
    if "modulation" in variables.get("params", {}):
        variables["params"] |= _modulation(layer, branch)
        if block.mixer is None and block.ffn is None:
            del variables["params"]["modulation"]
    return dataclasses.replace(layer, block=block, variables=variables)


def _modulation(layer: Layer, branch: str) -> dict[str, Any]:
    """The modulation of a diffusion block, without the branch's shift, scale and gate."""
    both = layer.block.mixer is not None and layer.block.ffn is not None  # type: ignore[attr-defined]
    rows = slice(3, 6) if branch == "mixer" and both else slice(0, 3) if both else slice(0, 0)
    held = layer.params["modulation"]["projection"]
    cut = {"kernel": held["kernel"][:, rows], "bias": held["bias"][rows]}  # [C, parts, C], [parts, C]
    return {"modulation": {"projection": cut}}


def _mixer(layer: Layer) -> Any:
    mixer = getattr(layer.block, "mixer", None)
    return mixer if type(mixer) in (Attention, ShiftedWindow) else None


def _ffn(layer: Layer) -> Any:
    ffn = getattr(layer.block, "ffn", None)
    return ffn if type(ffn) in (MLP, Gated) else None


def _turned(layer: Layer) -> bool:
    """Whether rotary positions turn its heads: units of queries and keys are then pairs of channels."""
    return layer.turned or getattr(_mixer(layer), "rotary_base", None) is not None


def _leaves(layer: Layer) -> Mapping[str, Any]:
    return flatten_dict(layer.params, sep="/")


def _members(layer: Layer, kind: Kind) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """The parameters that units of a kind have a part in, with the names of their axes."""
    if not getattr(sizes(layer), kind):
        raise UsageError(f"{layer.where} has no {kind} that it could lose.")
    for path, leaf in _leaves(layer).items():
        if isinstance(leaf, Stored):
            raise UsageError(f"{path} is stored in codes already: take structures out before.")
        axes = layer.axes[path]
        first, *rest = path.split("/")
        if kind == "hidden":
            if first == "ffn" and "mlp" in axes:
                yield path, axes
        elif first == "mixer":
            named = {"heads", "kv_heads"} if kind == "heads" else {"head_dim"}
            if named & {*axes} and (kind == "heads" or rest[0] in _PARTS[kind]):
                yield path, axes


def _by_unit(layer: Layer, kind: Kind, x: Array, axes: Sequence[str | None]) -> Float[Array, "*heads units"]:
    """Sums of one parameter: `[units]`, or `[heads, units]` of channels of heads."""
    x = x.astype(jnp.float32)
    if kind == "hidden":
        return jnp.moveaxis(x, axes.index("mlp"), 0).sum(axis=tuple(range(1, x.ndim)))
    heads = sizes(layer).heads
    at = next((i for i, name in enumerate(axes) if name in ("heads", "kv_heads")), None)
    if kind == "heads":
        assert at is not None
        return jnp.moveaxis(x, at, 0).reshape(heads, -1).sum(axis=1)
    channel = axes.index("head_dim")
    assert at is not None
    moved = jnp.moveaxis(x, (at, channel), (0, 1))  # [H, D, ...]
    grouped = moved.reshape(heads, -1, *moved.shape[1:])
    grouped = jnp.moveaxis(grouped, 2, 1).reshape(heads, moved.shape[1], -1).sum(axis=2)  # [G, D]
    if kind == "qk" and _turned(layer):
        grouped = grouped[:, _pairs(_mixer(layer), grouped.shape[1])].sum(axis=2)  # [G, D / 2]
    return grouped


def _taken(
    layer: Layer, kind: Kind, x: Array, axes: Sequence[str | None], units: np.ndarray
) -> Float[Array, "..."]:
    """What stays of one parameter."""
    if kind == "hidden":
        return jnp.take(x, units, axis=axes.index("mlp"))
    heads = sizes(layer).heads
    at = next((i for i, name in enumerate(axes) if name in ("heads", "kv_heads")), None)
    if kind == "heads":
        assert at is not None
        each = x.shape[at] // heads
        rows = (units[:, None] * each + np.arange(each)).ravel()
        return jnp.take(x, rows, axis=at)
    channel = axes.index("head_dim")
    if kind == "qk" and _turned(layer):
        pairs = _pairs(_mixer(layer), x.shape[channel])[units]  # [kept, 2]
        units = (pairs.T if _mixer(layer).rotary_pairs == "halves" else pairs).ravel()
    if units.ndim == 1:
        return jnp.take(x, units, axis=channel)
    assert at is not None
    rows = np.repeat(units, x.shape[at] // heads, axis=0)  # [H, kept]
    shape = [1] * x.ndim
    shape[at], shape[channel] = len(rows), rows.size // len(rows)
    order = rows if at < channel else rows.T
    return jnp.take_along_axis(x, jnp.asarray(order.reshape(shape)), axis=channel)


def _pairs(mixer: Attention, channels: int) -> np.ndarray:
    """`[D / 2, 2]`, which channels turn together."""
    if mixer.rotary_pairs == "halves":
        return np.arange(channels).reshape(2, -1).T
    return np.arange(channels).reshape(-1, 2)


def _narrowed(layer: Layer, kind: Kind, units: np.ndarray) -> Any:
    """The definition of the block with so many units."""
    count = units.shape[-1]
    if kind == "hidden":
        ffn = layer.block.ffn.clone(hidden=count, parent=None, name=None)  # type: ignore[attr-defined]
        return layer.block.clone(ffn=ffn, parent=None, name=None)
    mixer, leaves = _mixer(layer), _leaves(layer)
    query = leaves["mixer/query/kernel"].shape  # [C, H, D]
    heads, size = query[1], query[2]
    groups = leaves["mixer/key/kernel"].shape[1]
    changed: dict[str, Any] = dict(head_dim=size)
    if kind == "heads":
        changed |= dict(heads=heads // groups * count)
        if groups != heads or getattr(mixer, "kv_heads", None) is not None:
            changed |= dict(kv_heads=count)
    elif kind == "qk":
        changed |= dict(head_dim=2 * count if _turned(layer) else count)
        changed |= dict(value_dim=mixer.value_dim or size, scale=mixer.scale or size**-0.5)
        if _turned(layer):
            before = mixer.rotary_kept or tuple(range(size // 2))
            kept = tuple(before[i] for i in units)
            changed |= dict(rotary_dims=mixer.rotary_dims or size, rotary_kept=kept)
    else:
        changed |= dict(value_dim=count)
    return layer.block.clone(mixer=mixer.clone(**changed, parent=None, name=None), parent=None, name=None)
