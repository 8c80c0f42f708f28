"""Zeros in the weights: which numbers go, by the weights alone.

    random      drawn, as many in every matrix
    magnitude   the smallest of every matrix
    global      the smallest of all matrices
    lamp        s(w) = w^2 / sum_{|v| >= |w|, v in the matrix} v^2,  the smallest of all: Lee et al. 2021,
                arXiv:2010.07611
    dimap       the same sum over a module: the four matrices of an attention layer, the matrices of a
                feed-forward layer, or one that belongs to neither: He and Zhou 2024, ICLR, DIMAP

A score is the share of a matrix (a module) that is lost with a number and all smaller ones: matrices of other
scales can be held against each other, and the largest number of each is the last to go.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.compress.storage.masked import Masked, MaskedKernel
from effjax.compress.storage.matrices import flat
from effjax.compress.storage.trees import replaced, stored_in, with_beside
from effjax.compress.subject import Calibration, Subject, chosen, leaf_at
from effjax.errors import UsageError
from effjax.layers.stored import RANGES

Worth = Literal["random", "magnitude", "global", "lamp", "dimap"]

# What belongs to one module: everything up to the name of a branch.
_MODULE = re.compile(r"(.*(?:mixer|ffn))/.*")


@dataclasses.dataclass(frozen=True)
class Sparsify:
    """Sets numbers to zero, and keeps them there.

    Attributes:
      sparsity: share of all numbers of the kernels that go.
      worth: which, see above.
      pattern: `(n, m)`, n of every m neighbours along the inputs stay, in the place of `sparsity`; with
        `random` or `magnitude`.
      block: `(k, n)`, inputs and outputs that go or stay together; with the same two.
      kernels: regexps of whole paths.
      leave: regexps of kernels that stay whole, whatever `kernels` says.
    """

    sparsity: float = 0.5
    worth: Worth = "magnitude"
    pattern: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    kernels: tuple[str, ...] = (r"(blocks|stages_\d+)/.*",)
    leave: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"sparsity={self.sparsity} is a share from 0 to below 1.")
        together = self.pattern or self.block
        if together is not None and self.worth not in ("random", "magnitude"):
            name = "block" if self.pattern is None else "pattern"
            raise UsageError(f"{name}={together} asks for worth='random' or 'magnitude'.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Cuts.

        Raises:
          UsageError: for patterns that match no kernel, or do not divide one.
        """
        places = chosen(subject, self.kernels, self.leave)
        matrices = {path: flat(leaf_at(subject.params, path), place) for path, place in places.items()}
        layout = Masked(self.sparsity, self.pattern, block=self.block)
        if self.worth in ("random", "magnitude"):
            made = {}
            for number, (path, place) in enumerate(places.items()):
                layout.groups(place.matrix[0], path)
                matrix, key = matrices[path], jax.random.fold_in(calibration.key, number)
                drawn = self.worth == "random"
                worth = jax.random.uniform(key, matrix.shape) if drawn else jnp.abs(matrix)
                made[path] = layout.cut(matrix, worth, place)
        else:
            masks = smallest(scored(matrices, self.worth), self.sparsity)
            made = {path: layout.masked(matrices[path], masks[path], places[path]) for path in places}
        zeros = sum(float(leaf.sparsity) * leaf.kernel.size for leaf in made.values())
        share = zeros / sum(leaf.kernel.size for leaf in made.values())
        calibration.report(f"{share:.4f} of the numbers of {len(made)} kernels are zero.")
        params = replaced(subject.params, made)
        return dataclasses.replace(subject, variables=with_beside({**subject.variables, "params": params}))


@dataclasses.dataclass(frozen=True)
class Densify:
    """Lets zeros go: masked kernels are arrays again, which train as any other."""

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Drops the masks.

        Raises:
          UsageError: where no kernel has one.
        """
        found = {
            path: leaf for path, leaf in stored_in(subject.params).items() if isinstance(leaf, MaskedKernel)
        }
        if not found:
            raise UsageError("no kernel has a mask to drop.")
        params = replaced(subject.params, {path: leaf.kernel for path, leaf in found.items()})
        rest = {name: tree for name, tree in subject.variables.items() if name != RANGES}
        calibration.report(f"{len(found)} kernels have no mask any more.")
        return dataclasses.replace(subject, variables={**rest, "params": params})


def scored(
    matrices: Mapping[str, Float[Array, "*front k n"]], worth: Worth
) -> dict[str, Float[Array, "*front k n"]]:
    """What every number is worth, on a scale for all matrices.

    Args:
      matrices: by path, layers in front.
      worth: "global", "lamp" or "dimap".
    """
    squares = {path: jnp.square(matrix.astype(jnp.float32)) for path, matrix in matrices.items()}
    if worth == "global":
        return squares
    modules = defaultdict(list)
    for path, square in squares.items():
        found = _MODULE.fullmatch(path) if worth == "dimap" else None
        modules[(found.group(1) if found else path), square.shape[:-2]].append(path)
    made: dict[str, Array] = {}
    for (_, front), paths in modules.items():
        rows = jnp.concatenate([squares[path].reshape(*front, -1) for path in paths], axis=-1)
        scores, start = _shares(rows), 0
        for path in paths:
            size = int(np.prod(squares[path].shape[len(front) :]))
            made[path] = scores[..., start : start + size].reshape(squares[path].shape)
            start += size
    return made


@jax.jit
def _shares(squares: Float[Array, "*front n"]) -> Float[Array, "*front n"]:
    """Of every number, its square over the sum of all that are not smaller."""
    order = jnp.argsort(-squares, axis=-1)
    falling = jnp.take_along_axis(squares, order, axis=-1)
    shares = falling / jnp.maximum(jnp.cumsum(falling, axis=-1), jnp.finfo(jnp.float32).tiny)
    return jnp.take_along_axis(shares, jnp.argsort(order, axis=-1), axis=-1)


def smallest(scores: Mapping[str, Array], sparsity: float) -> dict[str, Array]:
    """Masks that are 0 at a share of all numbers, those with the lowest scores."""
    flat_scores = np.concatenate([np.asarray(score).ravel() for score in scores.values()])
    gone = round(sparsity * flat_scores.size)
    mask = np.ones(flat_scores.size, bool)
    mask[np.argsort(flat_scores, kind="stable")[:gone]] = False
    made, start = {}, 0
    for path, score in scores.items():
        made[path] = jnp.asarray(mask[start : start + score.size].reshape(score.shape))
        start += score.size
    return made
