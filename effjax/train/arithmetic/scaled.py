"""Products in 8 bits with a scale for every row and column: `qwix` makes codes, products and gradients.

    s = max |row| / largest code
    y = s_x s_W (q_x q_W),     dL/dx = (dL/dy s_W)_q q_W^T,     dL/dW = q_x^T (s_x dL/dy)_q

On the way back codes of the forward pass are used again, their scales move into the gradient, and the
gradient is rounded once more with a scale for each of its rows. Each of the three products is one of codes.

Of qwix the provider of quantised training is asked for each product by name. Its other way in,
`quantize_model`, patches the functions of jax while a model runs: there attention's sums of three operands
are refused, an activation of a kernel's shape passes for the kernel, and only the methods that are named are
seen. Here the kernel itself knows that it multiplies (`effjax.train.arithmetic.products`).

qwix: google/qwix. fp8 formats and which is for what: Micikevicius et al. 2022, arXiv:2209.05433.
"""

import dataclasses
import importlib.util
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.train.arithmetic.products import Arithmetic, Axes, straight_through

TYPES = {"int8": "int8", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclasses.dataclass(frozen=True)
class _Codes(Arithmetic):
    """Products of codes."""

    @property
    def types(self) -> tuple[str, str | None]:
        """Types of the operands, and of gradients."""
        raise NotImplementedError

    def check(self) -> None:
        """Whether qwix is here.

        Raises:
          UsageError: where it is not.
        """
        if importlib.util.find_spec("qwix") is None:
            raise UsageError(
                "config.train.arithmetic needs the package qwix: pip install 'effjax[low-precision]'."
            )

    def product(
        self, x: Float[Array, "..."], kernel: Float[Array, "..."], contracted: tuple[Axes, Axes]
    ) -> Float[Array, "..."]:
        """Sums over pairs of axes of codes."""
        import qwix

        operand, gradient = self.types
        # Both operands have one type: qwix need not find out which of them is a weight.
        rule = qwix.QtRule(weight_qtype=operand, act_qtype=operand, bwd_qtype=gradient)
        y: Array = qwix.QtProvider([rule]).dot_general(x, kernel, (contracted, ((), ())))
        return y.astype(x.dtype)

    def rounded(self, x: Float[Array, "..."], summed: Axes) -> Float[Array, "..."]:
        """What the codes of an operand stand for."""
        import qwix

        apart = [axis for axis in range(x.ndim) if axis not in summed]
        codes: Any = qwix.quantize(jax.lax.stop_gradient(x), self.types[0], channelwise_axes=apart)
        return straight_through(x, qwix.dequantize(codes).astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class Int8(_Codes):
    """Operands are integers of 8 bits.

    Attributes:
      gradients: of what leaves the product; None keeps them, and the products on the way back are those of
        the run's own precision with what entered as it was.
    """

    gradients: Literal["int8"] | None = "int8"

    @property
    def types(self) -> tuple[str, str | None]:
        """Types of the operands, and of gradients."""
        return "int8", self.gradients


@dataclasses.dataclass(frozen=True)
class Float8(_Codes):
    """Operands are floats of 8 bits.

    Attributes:
      operands: of the forward pass.
      gradients: of what leaves the product; None keeps them, and the products on the way back are those of
        the run's own precision with what entered as it was.
    """

    operands: Literal["e4m3", "e5m2"] = "e4m3"
    gradients: Literal["e4m3", "e5m2"] | None = "e5m2"

    @property
    def types(self) -> tuple[str, str | None]:
        """Types of the operands, and of gradients."""
        return TYPES[self.operands], None if self.gradients is None else TYPES[self.gradients]
