"""CG-Taylor: forecast the last layer, and trust the forecast where that of the first layer is right.

At call n, with features F recorded at computed calls s_0 > s_1 > ... (newest first):

    taylor    F~(n) = sum_i D_i (n - s_0)^i / i!             D_i = (D_(i-1) - D_(i-1)') / (s_0 - s_1)
    newton    F~(n) = sum_i D_i prod_(j < i) (n - s_j)       D_i = (D_(i-1) - D_(i-1)') / (s_0 - s_i)

where D_0 = F(s_0) and a prime marks what was recorded before. The first layer is computed at every call.
Where |F_1~ - F_1| / |F_1|, both summed over the whole batch, is below the threshold, the forecast of the last
layer goes to the head; else all layers run, and what is recorded of both is renewed. The published form is
`taylor`, exact for a trajectory that is linear in the calls; `newton` is exact for polynomials of its order,
at whatever calls were computed. Two layers' features are kept, where TaylorSeer keeps two a layer.

Source: Guan et al., "Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated
Taylor", 2025. The first calls and the last are computed, as in the published code (PaddleMIX), whose
threshold for FLUX is 0.13 at order 1.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.diffusion.caches.stages import Stages
from effjax.diffusion.denoiser import Condition, Denoiser
from effjax.errors import UsageError

Form = Literal["taylor", "newton"]


@flax.struct.dataclass
class Record:
    """Differences of one feature at the calls that were computed.

    Attributes:
      differences: `[order + 1, B, N, C]`, D_0 to D_order.
      at: `[order + 1]`, the calls s_0, s_1, ...
      count: how many calls were recorded.
    """

    differences: Any
    at: Any
    count: Any

    @classmethod
    def empty(cls, like: jax.ShapeDtypeStruct, order: int) -> "Record":
        """Nothing recorded yet."""
        zeros = jnp.zeros((order + 1, *like.shape), like.dtype)
        return cls(zeros, jnp.zeros(order + 1, jnp.float32), jnp.zeros((), jnp.int32))

    def renewed(self, feature: Float[Array, "b *places c"], call: Float[Array, ""], form: Form) -> "Record":
        """The record with one more computed call."""
        orders = self.differences.shape[0]
        differences = [feature]
        for i in range(1, orders):
            span = call - self.at[0 if form == "taylor" else i - 1]
            # As many orders as there were calls before; what is not known counts as none.
            known = self.count >= i
            rise = (differences[-1] - self.differences[i - 1]) / jnp.where(known, span, 1.0)
            differences.append(jnp.where(known, rise, 0.0).astype(feature.dtype))
        at = jnp.concatenate([call[None], self.at[: orders - 1]])
        return Record(jnp.stack(differences), at, self.count + 1)

    def forecast(self, call: Float[Array, ""], form: Form) -> Float[Array, "b *places c"]:
        """What the feature would be at a call."""
        orders = self.differences.shape[0]
        if form == "taylor":
            weights = [(call - self.at[0]) ** i / math.factorial(i) for i in range(orders)]
        else:
            weights = [jnp.prod(call - self.at[:i]) for i in range(orders)]
        basis = jnp.stack(weights).astype(self.differences.dtype)  # [order + 1]
        return jnp.tensordot(basis, self.differences, axes=1)  # [B, N, C]


@flax.struct.dataclass
class Memory:
    """What a sampler carries.

    Attributes:
      first: `Record` of the first layer's output.
      last: `Record` of the last layer's.
      call: calls so far.
      computed: calls at which all layers ran.
    """

    first: Any
    last: Any
    call: Int[Array, ""] | Any
    computed: Int[Array, ""] | Any

    @property
    def whole_calls(self) -> Any:
        """At how many calls the whole network was computed."""
        return self.computed


@dataclasses.dataclass(frozen=True)
class ConfidenceTaylor:
    """Skips layers where the forecast of the first one is good.

    Attributes:
      threshold: relative L1 error of the first layer's forecast below which the last layer's is used; 0
        computes everything, infinity nothing between the first calls and the last.
      order: of the last layer's forecast; 0 repeats what was computed last.
      first_order: of the first layer's.
      warmup: calls that are computed at the start, at least one.
      form: how differences are made and added up.
    """

    threshold: float = 0.13
    order: int = 1
    first_order: int = 1
    warmup: int = 5
    form: Form = "taylor"

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise UsageError(f"threshold={self.threshold:g} must not be negative: 0 computes everything.")
        if min(self.order, self.first_order) < 0:
            raise UsageError(
                f"order={self.order} and first_order={self.first_order} must be at least 0, which repeats "
                f"what was computed last."
            )
        if self.warmup < 1:
            raise UsageError(
                f"warmup={self.warmup} must be at least 1: nothing is known before the first call."
            )

    def wrap(self, stages: Stages, calls: int) -> Denoiser:
        """A denoiser that remembers.

        Args:
          stages: the network in pieces.
          calls: how often a sampler will call it; the last is computed.

        Raises:
          UsageError: for a network of one layer, of which nothing can be skipped.
        """
        if stages.depth < 2:
            raise UsageError("cg_taylor skips the layers behind the first, and this network has but one.")

        def start(x: Array, t: Array, condition: Condition) -> Memory:
            tokens = jax.eval_shape(lambda: stages.begin(x, t, condition).x)
            zero = jnp.zeros((), jnp.int32)
            first, last = Record.empty(tokens, self.first_order), Record.empty(tokens, self.order)
            return Memory(first, last, zero, zero)

        def predict(x_t: Array, t: Array, condition: Condition, memory: Memory) -> tuple[Array, Memory]:
            call = memory.call.astype(jnp.float32)
            stream = stages.layers(stages.begin(x_t, t, condition), (0, 1))
            error = _relative(memory.first.forecast(call, self.form), stream.x)
            trusted = (error < self.threshold) & (memory.call >= self.warmup) & (memory.call < calls - 1)

            def skip(memory: Memory) -> tuple[Array, Memory]:
                return memory.last.forecast(call, self.form), memory

            def compute(memory: Memory) -> tuple[Array, Memory]:
                x = stages.layers(stream, (1, stages.depth)).x  # [B, N, C]
                first = memory.first.renewed(stream.x, call, self.form)
                last = memory.last.renewed(x, call, self.form)
                return x, Memory(first, last, memory.call, memory.computed + 1)

            x, memory = jax.lax.cond(trusted, skip, compute, memory)  # [B, N, C]
            memory = Memory(memory.first, memory.last, memory.call + 1, memory.computed)
            return stages.finish(dataclasses.replace(stream, x=x)), memory

        return Denoiser(predict, start)


def _relative(forecast: Float[Array, "b *places c"], truth: Float[Array, "b *places c"]) -> Float[Array, ""]:
    """Relative L1 error, summed in float32."""
    forecast, truth = forecast.astype(jnp.float32), truth.astype(jnp.float32)
    return jnp.sum(jnp.abs(forecast - truth)) / jnp.sum(jnp.abs(truth))
