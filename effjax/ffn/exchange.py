"""Mixtures whose tokens travel to the devices that hold their experts, and back.

    route -> places [E, S, C] -> all-to-all -> experts of this device -> all-to-all -> weigh and add up

Each device lays the tokens that it has out by expert, S places for each, and sends every other device the
places of its experts. S = ceil(f K t / E) of t tokens at `room` f; who finds no place is dropped. None gives
each expert a place for every token: nothing is dropped, and E / K times as much travels as is used.

Which axes of a mesh cut experts is a rule of the config, `sharding.expert`, and need not be one of their own:
    sharding.expert = ("sequence", "tensor")      attention cut by heads and sequence, on the same devices
                                                  experts cut by both, and whole each
    sharding.expert_mlp                           cuts the hidden channels of each expert

So attention and experts have different meshes over the same devices, and nothing moves but the tokens:
Liu et al., "MoE Parallel Folding", 2025, arXiv:2504.14960. Its groups of attention (tensor, context, data)
are the axes `tensor`, `sequence`, and `data` with `fsdp`; of its groups of experts, the expert parallel ones
are the axes of `sharding.expert`, the tensor parallel ones those of `sharding.expert_mlp`, the data parallel
ones all others.

Where an axis cuts experts but no tokens, each of its devices sends a part of the tokens that they share.
A capacity (of `effjax.ffn.mixture`) is decided over all tokens before they travel, as on one device.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from effjax.errors import UsageError
from effjax.ffn.mixture import Mixture
from effjax.ffn.routing import capacity, ranks
from effjax.layers.axes import names_of
from effjax.parallel.each_device import mesh_axes


class ExchangedMixture(Mixture):
    """The mixture with its experts on different devices.

    Attributes:
      room: places of an expert for the tokens of one device, 1 is just enough where all experts are used
        alike; None leaves place for all.
    """

    room: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choice == "expert":
            raise UsageError(
                "experts that choose look at the tokens of all devices: choice='expert' needs kind 'mixture'."
            )
        if self.room is not None:
            capacity(self.room, 1, self.chosen, self.experts)

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, C]
        logits = self.logits(tokens, train)  # [T, E]
        weights, index = self.best(logits, train)  # [T, K]
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "routes", self.served(logits, weights, index, train))
        factor = self.factor(train)
        if factor is not None:
            limit = capacity(factor, len(tokens), self.chosen, self.experts)
            index = jnp.where(ranks(index, self.experts, self.first(logits)) < limit, index, self.experts)
        shape = (*x.shape[:-1], self.chosen)
        kernels = self.kernels(x.shape[-1], x.dtype)
        y = self._travel(x, index.reshape(shape), weights.reshape(shape), kernels, train)
        return y + self.common(x) if self.shared else y

    @nn.nowrap
    def _travel(
        self,
        x: Array,
        index: Int[Array, "*batch k"],
        weights: Float[Array, "*batch k"],
        kernels: dict[str, Array],
        train: bool,
    ) -> Float[Array, "*batch c"]:
        """What the experts say, on each device for its tokens."""
        mesh = jax.sharding.get_abstract_mesh()
        folded = _Folded.of(mesh, x.shape, self.experts, self.hidden)
        if not folded.tokens or self.is_initializing():
            return self._on_a_device(x, index, weights, kernels, train, _Folded())
        cut = PartitionSpec(*folded.tokens)
        experts, hidden = folded.experts or None, folded.hidden or None
        specs = {
            "gate": PartitionSpec(experts, None, hidden),
            "expand": PartitionSpec(experts, None, hidden),
            "contract": PartitionSpec(experts, hidden),
            "bias": PartitionSpec(experts, hidden),
        }
        run = jax.shard_map(
            functools.partial(self._on_a_device, train=train, folded=folded),
            mesh=mesh,
            in_specs=(cut, cut, cut, {name: specs[name] for name in kernels}),
            out_specs=cut,
            check_vma=False,
        )
        return run(x, index, weights, kernels)

    @nn.nowrap
    def _on_a_device(
        self,
        x: Array,
        index: Array,
        weights: Array,
        kernels: Mapping[str, Array],
        train: bool,
        folded: "_Folded",
    ) -> Array:
        """What one device does: its tokens, the experts it has, and whom it shares either with."""
        shape, width = x.shape, x.shape[-1]
        x, index, weights = (a.reshape(-1, a.shape[-1]) for a in (x, index, weights))  # [T, .]
        x, weights = folded.own(x, 0), folded.own(weights, 0)  # [t, C], [t, K]
        index = folded.own(index, self.experts)  # [t, K]
        rows, places, left = self.placed(x, index, train)  # [E, S, C], [t, K], [t, K, C]
        rows = folded.there(rows)  # [E', D S, C]
        sizes = jnp.full((len(rows),), rows.shape[1], jnp.int32)
        with nn.logical_axis_rules(()):
            out = self.run_through(rows.reshape(-1, width), sizes, kernels)  # [E' D S, C]
        out = folded.back(out.reshape(rows.shape)).reshape(-1, width)  # [E S, C]
        heard = jnp.take(out, places, axis=0, mode="fill", fill_value=0)  # [t, K, C]
        weights = jnp.where(places < len(out), weights, 0).astype(x.dtype)
        y = jnp.einsum("tkc,tk->tc", heard, weights)
        if folded.hidden:
            y = lax.psum(y, folded.hidden)
        if left is not None:
            y = y + jnp.einsum("tkc,tk->tc", left, weights)
        return folded.all(y, math.prod(shape[:-1])).reshape(shape)

    @nn.nowrap
    def placed(
        self, x: Float[Array, "t c"], index: Int[Array, "t k"], train: bool
    ) -> tuple[Float[Array, "e s c"], Int[Array, "t k"], Float[Array, "t k c"] | None]:
        """Lays the tokens of a device out by expert.

        Args:
          x: tokens.
          index: of their experts; the number of experts for none.
          train: whether the network is trained.

        Returns:
          The rows of the experts; which of them, counted over all experts, each token hears, E S for none;
          and what is added to what it hears.
        """
        count = len(x)
        space = count if self.room is None else capacity(self.room, count, self.chosen, self.experts)
        rank = ranks(index, self.experts)  # [t, K]
        total = self.experts * space
        places = jnp.where((index < self.experts) & (rank < space), index * space + rank, total)  # [t, K]
        token = jnp.broadcast_to(jnp.arange(count)[:, None], places.shape)
        source = jnp.full((total,), count, token.dtype).at[places].set(token, mode="drop")  # [E S]
        rows = jnp.take(x, source, axis=0, mode="fill", fill_value=0)
        return rows.reshape(self.experts, space, -1), places, None


@dataclasses.dataclass(frozen=True)
class _Folded:
    """Over which axes of a mesh tokens, experts and their channels are cut.

    Attributes:
      tokens: axes of each dimension of the tokens; empty where there is one device.
      experts: axes that cut the experts.
      hidden: axes that cut the channels of each.
      shared: those of `experts` that cut no tokens.
      sizes: of the mesh.
    """

    tokens: tuple[tuple[str, ...] | None, ...] = ()
    experts: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, mesh: Any, shape: tuple[int, ...], experts: int, hidden: int) -> "_Folded":
        """By the rules that are active; whole on one device, and where the mesh does not divide the tokens.

        Raises:
          UsageError: for rules that cut the experts' channels along what cuts tokens, or do not divide.
        """
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return cls()
        tokens = tuple(mesh_axes((name,), mesh)[0] for name in (*names_of(len(shape)), None))
        of_experts, of_hidden = mesh_axes(("expert", "expert_mlp"), mesh)
        sizes, cutting = dict(mesh.shape), {axis for axes in tokens for axis in axes}
        if both := sorted(cutting & set(of_hidden)):
            raise UsageError(
                f"config.sharding.expert_mlp cuts channels of experts along {both[0]!r}, as tokens are cut:"
                " name an axis that does not, or none."
            )
        for what, count, axes in (("experts", experts, of_experts), ("hidden", hidden, of_hidden)):
            if count % (parts := math.prod(sizes[axis] for axis in axes)):
                raise UsageError(
                    f"{what}={count} of the mixture is not divided by the {parts} devices of the mesh's "
                    f"{' x '.join(axes)}."
                )
        for side, axes in zip(shape, tokens, strict=True):
            if side % math.prod(sizes[axis] for axis in axes):
                return cls()
        shared = tuple(axis for axis in of_experts if axis not in cutting)
        return cls(tuple(axes or None for axes in tokens), of_experts, of_hidden, shared, sizes)

    def parts(self, axes: tuple[str, ...]) -> int:
        """Devices along some axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def own(self, rows: Shaped[Array, "t _"], fill: int) -> Shaped[Array, "s _"]:
        """Of rows that several devices share, those that this one sends."""
        if not self.shared:
            return rows
        each = -(-len(rows) // self.parts(self.shared))
        rows = jnp.pad(rows, ((0, each * self.parts(self.shared) - len(rows)), (0, 0)), constant_values=fill)
        return lax.dynamic_slice_in_dim(rows, lax.axis_index(self.shared) * each, each)

    def all(self, rows: Float[Array, "s c"], count: int) -> Float[Array, "t c"]:
        """The rows that several devices share, of those that each has sent."""
        return lax.all_gather(rows, self.shared, tiled=True)[:count] if self.shared else rows

    def there(self, rows: Float[Array, "e s c"]) -> Float[Array, "f ds c"]:
        """From every device its rows of the experts of this one."""
        if self.parts(self.experts) == 1:
            return rows
        return lax.all_to_all(rows, self.experts, split_axis=0, concat_axis=1, tiled=True)

    def back(self, rows: Float[Array, "f ds c"]) -> Float[Array, "e s c"]:
        """What the experts of other devices say of the rows of this one."""
        if self.parts(self.experts) == 1:
            return rows
        return lax.all_to_all(rows, self.experts, split_axis=1, concat_axis=0, tiled=True)
