"""A depthwise convolution that is trained as several side by side and used as one.

    trained    y = N_0(x * K_0) + sum_i N_i(x * K_i dilated by r_i) [+ x],    N a batch norm
    merged     y = x * K + b

Convolution is linear and a batch norm in evaluation is affine, so K is the sum of all kernels, each scaled
by its norm, with zeros between the taps of a dilated one and at the edges of a small one; identity is a
kernel of one tap.

Source: RepVGG, Ding et al. 2021, section 3.3, for small kernels beside one of 3 x 3; UniRepLKNet, Ding et
al. 2024, section 3.2, for dilated kernels beside a large one. Branches of kernels other than 13 are those of
UniRepLKNet's published code.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress import fold
from effjax.compress.merge import Fold, Variables, unchanged
from effjax.errors import UsageError
from effjax.layers.depthwise import DepthwiseConv, Implementation
from effjax.layers.norms import norm
from effjax.mixers.context import Context

# Side and dilation of each branch beside a large kernel of a given side.
DILATED = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class ReparamDepthwise(nn.Module):
    """Parallel depthwise convolutions.

    Attributes:
      kernel: side of the largest kernel, which is odd.
      branches: side and dilation of each convolution beside it; None takes `DILATED`. Without branches and
        identity the convolution stands alone and has no norm.
      identity: whether the map itself is added.
      epsilon: of the norms.
      merged: whether this is the form for use, one convolution with a bias.
      implementation: of convolutions without dilation, as `effjax.layers.depthwise` has it; others are plain.
    """

    kernel: int = 13
    branches: tuple[tuple[int, int], ...] | None = None
    identity: bool = False
    epsilon: float = 1e-5
    merged: bool = False
    implementation: Implementation = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches is None and self.kernel not in DILATED:
            known = ", ".join(map(str, DILATED))
            raise UsageError(f"kernel={self.kernel} has no branches of its own ({known} have): name them.")
        for side, dilation in self._branches():
            extent = dilation * (side - 1) + 1
            if extent > self.kernel or not extent % 2 == self.kernel % 2 == 1:
                raise UsageError(
                    f"a branch of side {side} and dilation {dilation} spans {extent} places, which do not "
                    f"fit in the middle of a kernel of {self.kernel}: both must be odd."
                )

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Context, train: bool = False
    ) -> Float[Array, "b h w c"]:
        """Mixes every place with its neighbours."""
        if self.merged or not self._parallel():
            options: dict[str, Any] = dict(use_bias=self.merged, implementation=self.implementation)
            return DepthwiseConv(self.kernel, name="conv", **options)(x)  # [B, H, W, C]
        total = x if self.identity else jnp.zeros_like(x)
        for end, side, dilation in self._named():
            options = dict(use_bias=False, implementation=self.implementation if dilation == 1 else "plain")
            y = DepthwiseConv(side, dilation=dilation, name=f"conv{end}", **options)(x)  # [B, H, W, C]
            total = total + norm("batch", self.epsilon, f"norm{end}", train=train)(y)
        return total

    @nn.nowrap
    def merge(self) -> tuple["ReparamDepthwise", Fold]:
        """One convolution with a bias."""
        return (self, unchanged) if self.merged else (self.clone(merged=True), self._fold)

    @nn.nowrap
    def _fold(self, variables: Variables) -> Variables:
        params = variables["params"]
        channels = params["conv"]["kernel"].shape[-1]
        if not self._parallel():
            return {"params": {"conv": {**params["conv"], "bias": jnp.zeros(channels)}}}
        layers = [fold.identity(channels)] if self.identity else []
        for end, _, dilation in self._named():
            layer = {"kernel": fold.dense_form(params[f"conv{end}"]["kernel"], dilation)}
            statistics = variables["batch_stats"][f"norm{end}"]
            affine = fold.batch_norm(params[f"norm{end}"], statistics, self.epsilon)
            layers.append(fold.affine_behind(layer, affine))
        return {"params": {"conv": fold.side_by_side(layers, self.kernel)}}

    @nn.nowrap
    def _branches(self) -> tuple[tuple[int, int], ...]:
        return DILATED[self.kernel] if self.branches is None else self.branches

    @nn.nowrap
    def _parallel(self) -> bool:
        return bool(self._branches()) or self.identity

    @nn.nowrap
    def _named(self) -> list[tuple[str, int, int]]:
        """End of the name, side and dilation of every convolution."""
        return [("", self.kernel, 1), *((f"_{k}_{r}", k, r) for k, r in self._branches())]
