"""Sparse kernels whose mask never changes: zeros stay zeros, in training too.

    W = M * W,    dL/dW = M * dL/d(M * W)                      M is 0 or 1

The kernel in the tree is the float one, with zeros where it is masked. The mask stands beside the parameters,
in the collection `ranges` at the kernel's path, so that it is saved, restored and cut over a mesh with
everything else. It is read off the kernel's zeros at the start: a kernel that starts at zero as a whole would
stay there, and has no place here.

Zeros anywhere, or `pattern=(n, m)`: n numbers of every m that lie behind one another along the inputs, as
some matrix units skip them (Mishra et al. 2021, arXiv:2104.08378). Memory and time are those of the whole
matrix: nothing here reads fewer numbers.
"""

import dataclasses
import zlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.storage.matrices import FloatKernel, flat, in_blocks, unflat
from effjax.errors import UsageError
from effjax.layers.stored import RANGES, Place, Stored


@dataclasses.dataclass(frozen=True)
class Masked:
    """A layout of float kernels with zeros that stay.

    Attributes:
      sparsity: share of the numbers of each matrix that are drawn to be zero, where a network starts so.
      pattern: `(n, m)`, what is kept of how many neighbours, in the place of `sparsity`.
      seed: of the draw.
      block: `(k, n)`, inputs and outputs that are zero together.
    """

    sparsity: float = 0.5
    pattern: tuple[int, int] | None = None
    seed: int = 0
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"sparsity={self.sparsity} is a share from 0 to below 1.")
        if self.pattern is not None and not 0 < self.pattern[0] <= self.pattern[1]:
            raise UsageError(f"pattern={self.pattern} keeps n of m numbers: 0 < n <= m.")
        if self.block is not None and (self.pattern is not None or min(self.block) < 1):
            raise UsageError(f"block={self.block} has at least one input and one output, and no pattern.")

    def groups(self, rows: int, where: str = "the matrix") -> int:
        """How many patterns there are along the inputs.

        Raises:
          UsageError: where they do not divide.
        """
        if self.pattern is None:
            return 1
        if rows % self.pattern[1]:
            raise UsageError(f"{where} has {rows} inputs, which {self.pattern[1]} neighbours do not divide.")
        return rows // self.pattern[1]

    def bits_a_weight(self, rows: int, columns: int) -> float:
        """Bits that a weight takes: zeros are stored."""
        del rows, columns
        return 32.0

    def store(self, kernel: Float[Array, "..."], place: Place) -> "MaskedKernel":
        """A kernel with zeros that are drawn."""
        matrix = flat(kernel, place)
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(place.path.encode()))
        return self.cut(matrix, jax.random.uniform(key, matrix.shape), place)

    def cut(
        self, matrix: Float[Array, "*front k n"], worth: Float[Array, "*front k n"], place: Place
    ) -> "MaskedKernel":
        """A kernel with zeros where numbers are worth least, as many in every matrix."""
        if self.pattern is None:
            if self.block is not None:
                parted = in_blocks(worth, self.block, place.path)  # [.., K / k, k, N / n, n]
                worth = jnp.mean(parted, (-3, -1))  # [.., K / k, N / n]
            rows = worth.reshape(*worth.shape[:-2], -1)
            gone = round(self.sparsity * rows.shape[-1])
        else:
            turned = jnp.swapaxes(worth, -1, -2)
            rows = turned.reshape(*turned.shape[:-1], self.groups(place.matrix[0]), self.pattern[1])
            gone = self.pattern[1] - self.pattern[0]
        ranks = jnp.argsort(jnp.argsort(rows, axis=-1), axis=-1)
        mask = ranks >= gone
        if self.pattern is None:
            mask = mask.reshape(worth.shape)
            for axis, times in zip((-2, -1), self.block or (), strict=False):
                mask = jnp.repeat(mask, times, axis)
        else:
            mask = jnp.swapaxes(mask.reshape(turned.shape), -1, -2)
        return self.masked(matrix, mask, place)

    def masked(self, matrix: Float[Array, "*front k n"], mask: Array, place: Place) -> "MaskedKernel":
        """A kernel with zeros where a mask has them."""
        kernel = unflat(jnp.where(mask, matrix, 0), place.ins, place.outs, place.turned)
        return MaskedKernel(kernel, self, place.ins, place.outs, place.turned)

    def names(self, place: Place) -> "MaskedKernel":
        """Names of the axes of what `store` makes."""
        return MaskedKernel(place.names, self, place.ins, place.outs, place.turned)  # type: ignore[arg-type]


@flax.struct.dataclass
class MaskedKernel(FloatKernel):
    """A float kernel with zeros."""

    def within(self, module: nn.Module, name: str) -> Stored:
        """The kernel times the mask that the module keeps; without one, the kernel itself."""
        if not module.has_variable(RANGES, name):
            return self
        mask: Array = module.get_variable(RANGES, name)["mask"]
        return self.replace(kernel=jnp.where(mask, self.kernel, 0))  # type: ignore[attr-defined]

    def beside(self) -> dict[str, Any]:
        """The mask: where the kernel is not zero."""
        return {"mask": self.kernel != 0}

    @property
    def sparsity(self) -> Float[Array, ""]:
        """Share of zeros."""
        return jnp.mean(self.kernel == 0)
