"""FineQuant: groups as fine as the weights of a matrix ask for, found without data.

    r(g) = mean over groups of g weights of  max |w|                     g = K, K/2, K/4, ..
    g <- g / 2     while   r(g/2) < (1 - alpha) r(g)   and   g/2 >= smallest

and rounded to the nearest code of a symmetric grid, s = max |w| / (2^(b-1) - 1), a scale for every group.

The range of evenly spread weights hardly shrinks where a group is halved (of normal ones by 4% at 4096 and by
9% at 128), and that of a group with an outlier stays in one half only. So columns stay whole but where few
weights set the grid of all others.

Source: Kim, Henry, Fahim and Awadalla, "FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only
Quantization for LLMs", 2023, arXiv:2308.09723. Its text was not at hand: that a range is averaged over groups
and columns, and the value of alpha, are ours.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.compress.storage.matrices import flat
from effjax.compress.storage.trees import replaced
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration, Subject, chosen, leaf_at
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class FineQuant:
    """Rounds kernels, each in groups of its own size.

    What is one array shares a layout: a stack of layers, or of experts, takes the finest groups that one of
    its matrices asks for.

    Attributes:
      bits: of a code.
      alpha: share by which the range has to shrink for a group to be halved; 1 never halves.
      smallest: weights of the smallest group.
      kernels: regexps of whole paths.
      leave: regexps of kernels that stay arrays, whatever `kernels` says.
      scale: dtype of the scales.
    """

    bits: int = 4
    alpha: float = 0.1
    smallest: int = 64
    kernels: tuple[str, ...] = (".*",)
    leave: tuple[str, ...] = ()
    scale: Literal["float32", "float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha} is not from 0 to 1.")
        if self.smallest < 1:
            raise UsageError(f"smallest={self.smallest}: a group has at least one weight.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Rounds.

        Raises:
          UsageError: for a pattern that matches no kernel.
        """
        made = {}
        for path, place in chosen(subject, self.kernels, self.leave).items():
            kernel = jnp.asarray(leaf_at(subject.params, path))
            layout = self.layout(flat(kernel, place))
            made[path] = jax.jit(layout.store, static_argnums=1)(kernel, place)
            size = layout.group or place.matrix[0]
            calibration.report(
                f"{path}: groups of {size}, {layout.bits_a_weight(*place.matrix):.3f} bits a weight."
            )
        return subject.with_params(replaced(subject.params, made))

    def layout(self, matrix: Float[Array, "*front k n"]) -> Uniform:
        """The layout that fits the weights; matrices in front share it."""
        sizes = halvings(matrix.shape[-2], self.smallest)
        spans = np.asarray(_ranges(matrix, tuple(sizes)))  # [sizes, matrices]
        shrinks = spans[1:] < (1 - self.alpha) * spans[:-1]
        halved = int(np.max(np.sum(np.cumprod(shrinks, axis=0), axis=0), initial=0))
        return Uniform(self.bits, sizes[halved] if halved else 0, True, self.scale)


def halvings(rows: int, smallest: int) -> list[int]:
    """Sizes of groups from a whole column down, each half of the one before."""
    sizes = [rows]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return sizes


def _ranges(matrix: Float[Array, "*front k n"], sizes: tuple[int, ...]) -> Float[Array, "sizes matrices"]:
    """r(g) of every matrix for every size."""
    weights = jnp.abs(matrix.astype(jnp.float32)).reshape(-1, *matrix.shape[-2:])  # [F, K, N]

    def of(size: int) -> Float[Array, " matrices"]:
        parts = weights.reshape(weights.shape[0], -1, size, weights.shape[-1])  # [F, G, g, N]
        return jnp.mean(jnp.max(parts, axis=2), axis=(1, 2))  # [F]

    return jnp.stack([of(size) for size in sizes])
