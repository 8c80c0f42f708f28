"""The pyramid: maps that grow coarser and wider from stage to stage.

    x_0 = stem(image)
    x_s = stage_s(x_{s-1}),  stage_s = blocks after downsampling        s = 1 .. S
    logits = head(x_S)

A backbone is a config of this skeleton: Swin, ConvNeXt, PoolFormer and most that follow them differ in what
stands at these places. Depth is a scan over cycles of a stage's blocks: `blocks=(a, b)` with a depth of 6 is
a, b, a, b, a, b with three-fold parameters; what is left of an odd depth stands behind the scan. A block may
be several layers: it then says so in `layers`, counts for as many, and gets a drop rate for each.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from effjax.compress.merge import Fold, at, plan
from effjax.config import part
from effjax.errors import UsageError
from effjax.layers import downsample
from effjax.layers.axes import constrain
from effjax.layers.drop import linear_rates
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models import heads
from effjax.models.blocks import KINDS as BLOCKS


class Cycle(nn.Module):
    """Different blocks one after another, as the unit that a scan repeats."""

    members: tuple[nn.Module, ...]

    @property
    def layers(self) -> int:
        """Those of all members."""
        return sum(map(layers, self.members))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rates: Float[Array, " k"],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h2 w2 c2"], None]:
        """Runs every member with its own drop rates."""
        begun = 0
        for member in self.members:
            x, _ = member(x, own_rates(member, drop_rates[begun:]), context, train=train)
            begun += layers(member)
        return x, None


def layers(block: nn.Module) -> int:
    """How many layers of a stage's depth a block is."""
    return getattr(block, "layers", 1)


def own_rates(block: nn.Module, rates: Float[Array, " k"]) -> Float[Array, "..."]:
    """The first of the rates: one, or as many as the block has layers."""
    return rates[0] if layers(block) == 1 else rates[: layers(block)]


class Stage(nn.Module):
    """Blocks at one resolution.

    Attributes:
      depth: number of layers, those of `first` among them; most blocks are one.
      dim: channels with which a cycle of blocks begins and ends.
      blocks: the blocks to repeat in turn. Within a cycle they may differ in width, and where a stage ends
        in the middle of one, so does its output.
      downsample: what makes the map coarser before the blocks; None keeps it.
      first: a block of another kind at the start, which may stride and widen.
    """

    depth: int
    dim: int
    blocks: tuple[nn.Module, ...] = part(BLOCKS, default=())
    downsample: nn.Module | None = part(downsample.KINDS, default=None)
    first: nn.Module | None = part(BLOCKS, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        first = 0 if self.first is None else layers(self.first)
        rest, ends = self.depth - first, np.cumsum([0, *map(layers, self.blocks)])
        if rest < 0 or (rest and (not self.blocks or rest % ends[-1] not in ends)):
            raise UsageError(
                f"depth={self.depth} and {len(self.blocks)} kinds of blocks make no stage of whole blocks."
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rates: Float[Array, " depth"],
        train: bool = False,
        remat: str = "none",
        unroll: int = 1,
    ) -> Float[Array, "b h2 w2 dim"]:
        """Downsamples and runs the blocks; `remat` and `unroll` as in `Stack`, which counts cycles."""
        context = Context()
        if self.downsample is not None:
            x = self.downsample(x, self.dim, train=train)  # [B, H', W', C']
        if self.first is not None:
            x, _ = self.first(x, own_rates(self.first, drop_rates), context, train=train)
            drop_rates = drop_rates[layers(self.first) :]
        if x.shape[-1] != self.dim:
            raise UsageError(
                f"a stage of dim={self.dim} gets {x.shape[-1]} channels: give it a downsample, or that dim."
            )
        x = constrain(x)
        if not len(drop_rates):
            return x
        cycle = self.blocks[0] if len(self.blocks) == 1 else Cycle(self.blocks)
        cycles, rest = divmod(len(drop_rates), layers(cycle))
        if cycles:
            each = drop_rates[: cycles * layers(cycle)]
            each = each if layers(cycle) == 1 else each.reshape(cycles, -1)
            stack = Stack(cycle, cycles, remat=remat, unroll=unroll, name="stack")
            x, _ = stack(x, context, each=each, train=train)
        drop_rates = drop_rates[len(drop_rates) - rest :]
        for i, block in enumerate(self.blocks):
            if not len(drop_rates):
                break
            stack = Stack(block, 1, remat=remat, name=f"rest_{i}")
            x, _ = stack(x, context, each=own_rates(block, drop_rates)[None], train=train)
            drop_rates = drop_rates[layers(block) :]
        return x

    @nn.nowrap
    def merge(self) -> tuple["Stage", Fold]:
        """Every block merged; those of a scan keep their layers in front."""
        changed: dict[str, Any] = {}
        folds: dict[str, Fold] = {}
        for name in ("downsample", "first"):
            if getattr(self, name) is not None:
                changed[name], folds[name] = plan(getattr(self, name))
        if self.blocks:
            cycle = self.blocks[0] if len(self.blocks) == 1 else Cycle(self.blocks)
            folds["stack"] = jax.vmap(plan(cycle)[1])
            planned = [plan(block) for block in self.blocks]
            changed["blocks"] = tuple(definition for definition, _ in planned)
            folds |= {f"rest_{i}": jax.vmap(fold) for i, (_, fold) in enumerate(planned)}
        return self.clone(**changed), at(folds)


class Pyramid(nn.Module):
    """A hierarchical image classifier.

    Attributes:
      stages: coarser and coarser.
      classes: outputs of the head; 0 returns pooled features.
      stem: from pixels to the first map.
      head: from the last map to logits.
      drop_path: stochastic depth of the last block, growing linearly from 0 over all stages.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: cycles of blocks a scan iteration.
    """

    stages: tuple[Stage, ...]
    classes: int
    stem: nn.Module = part(downsample.KINDS)
    head: nn.Module = part(heads.KINDS)
    drop_path: float = 0.0
    remat: str = "none"
    unroll: int = 1

    def __call__(
        self, images: Float[Array, "b height width channels"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns logits; `train` switches stochastic depth and batch statistics on."""
        x = self.features(images, train=train)[f"stage_{len(self.stages)}"]  # [B, H_S, W_S, C_S]
        return self.head(x, self.classes, train=train)

    def features(
        self, images: Float[Array, "b height width channels"], train: bool = False
    ) -> dict[str, Float[Array, "b ..."]]:
        """The map behind every stage by name, `stem` and `stage_1` to `stage_S`, for dense tasks."""
        x = self.stem(images, self.stages[0].dim, train=train)  # [B, H_0, W_0, C_0]
        maps = {"stem": x}
        rates = linear_rates(self.drop_path, sum(stage.depth for stage in self.stages))
        begun = 0
        for i, stage in enumerate(self.stages, start=1):
            own = rates[begun : begun + stage.depth]
            x = stage(x, own, train=train, remat=self.remat, unroll=self.unroll)  # [B, H_i, W_i, C_i]
            maps[f"stage_{i}"] = x
            begun += stage.depth
        return maps
