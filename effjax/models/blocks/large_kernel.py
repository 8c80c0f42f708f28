"""The residual block of UniRepLKNet: a depthwise convolution to see wide, an FFN to go deep.

    h = SE(N(conv(x)))
    y = x + drop(s * N(GRN(gelu(h W_1 + b_1)) W_2)),    N a batch norm, SE squeeze and excite

LarK blocks have a large kernel with dilated branches, SmaK blocks one of 3 x 3. Merged for use, the first
norm is part of the convolution; the bias of GRN, the second norm and the scale s are part of W_2.

Source: UniRepLKNet, Ding et al. 2024, section 3.1 and figure 3; the merged form is that of its code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress import fold
from effjax.compress.merge import Fold, Variables, at, plan, unchanged
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense, named
from effjax.layers.drop import drop_path
from effjax.layers.norms import norm
from effjax.layers.response_norm import GlobalResponseNorm
from effjax.layers.squeeze_excite import SqueezeExcite
from effjax.mixers.context import Context
from effjax.mixers.reparam_depthwise import ReparamDepthwise


class LargeKernel(nn.Module):
    """LarK or SmaK, as the convolution's side makes it.

    Attributes:
      mixer: the depthwise convolution.
      ratio: expansion of the FFN.
      squeeze: channels inside squeeze and excite, as a share of all.
      layer_scale: initial value of the channel scales; None leaves them out.
      epsilon: of the batch norms.
      merged: whether this is the form for use; then `mixer` is merged too.
    """

    mixer: ReparamDepthwise
    ratio: float = 4.0
    squeeze: float = 0.25
    layer_scale: float | None = 1e-6
    epsilon: float = 1e-5
    merged: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop_rate: Float[Array, ""], context: Context, train: bool = False
    ) -> tuple[Float[Array, "b h w c"], None]:
        """Returns `(x, None)`; `drop_rate` is this layer's stochastic depth."""
        channels = x.shape[-1]
        h = self.mixer(x, context, train=train)  # [B, H, W, C]
        if not self.merged:
            h = norm("batch", self.epsilon, "mixer_norm", train=train)(h)
        h = SqueezeExcite(self.squeeze, name="gate")(h)  # [B, H, W, C]
        h = Dense(round(channels * self.ratio), ("embed", "mlp"), name="expand")(h)  # [B, H, W, F]
        h = constrain(jax.nn.gelu(h, approximate=False), "mlp")
        h = GlobalResponseNorm(use_bias=not self.merged, name="response")(h)  # [B, H, W, F]
        h = Dense(channels, ("mlp", "embed"), use_bias=self.merged, name="contract")(h)  # [B, H, W, C]
        if not self.merged:
            h = norm("batch", self.epsilon, "ffn_norm", train=train)(h)
            if self.layer_scale is not None:
                init = named(nn.initializers.constant(self.layer_scale), ("norm",))
                scale = self.param("scale", init, (channels,), jnp.float32)
                h = h * scale.astype(h.dtype)[None, None, None]
        if train and self.has_rng("dropout"):
            h = drop_path(h, drop_rate, self.make_rng("dropout"))
        return constrain(x + h), None

    @nn.nowrap
    def merge(self) -> tuple["LargeKernel", Fold]:
        """One convolution and two projections, without batch norms and scales."""
        if self.merged:
            return self, unchanged
        mixer, fold_mixer = plan(self.mixer)

        def folded(variables: Variables) -> Variables:
            statistics = variables["batch_stats"]
            params = at({"mixer": fold_mixer})(variables)["params"]
            first, second = (
                fold.batch_norm(params[name], statistics[name], self.epsilon)
                for name in ("mixer_norm", "ffn_norm")
            )
            shift = params["response"]["bias"]
            contract = fold.affine_before(params["contract"], fold.Affine(jnp.ones_like(shift), shift))
            contract = fold.affine_behind(contract, second)
            if self.layer_scale is not None:
                scale = params["scale"]
                contract = fold.affine_behind(contract, fold.Affine(scale, jnp.zeros_like(scale)))
            return {
                "params": {
                    "mixer": {"conv": fold.affine_behind(params["mixer"]["conv"], first)},
                    "gate": params["gate"],
                    "expand": params["expand"],
                    "response": {"scale": params["response"]["scale"]},
                    "contract": contract,
                }
            }

        return self.clone(mixer=mixer, merged=True), folded
