"""Bytes of weights that a step reads of a sparse layer: a memory of slots against a mixture of experts.

    touched = N (1 - (1 - c / N)^T)        of N parts, where each of T tokens takes c, each set as likely
    bytes = b (touched x part + common)

With few tokens a mixture reads whole experts for each, a memory only the rows of its slots; with many both
read all they have. Huang et al., "UltraMemV2", 2025, arXiv:2508.18756, compare such reads.
"""

import dataclasses

from effjax.errors import UsageError
from effjax.ffn.compressed_mixture import CompressedMixture
from effjax.ffn.memory import Memory
from effjax.ffn.mixture import Mixture
from effjax.measure.analytic.shape import Number


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A layer of `parts`, of which a token takes `taken`; counts of elements."""

    parts: int
    taken: int
    part: int
    """Elements of one part."""
    common: int
    """Elements that every token meets: router, keys, projections, a layer beside."""

    @classmethod
    def of(cls, layer: Memory | Mixture, dim: int) -> "Sparse":
        """Reads the counts off a definition, at a width.

        Raises:
          UsageError: for a mixture with biases, or with experts that are vectors.
        """
        if isinstance(layer, Mixture):
            if layer.use_bias:
                raise UsageError("no closed form for a mixture with biases: set use_bias=False.")
            if isinstance(layer, CompressedMixture) and layer.vectors != "none":
                raise UsageError("no closed form for experts that are vectors: set vectors='none'.")
            matrices = 3 if layer.gated else 2
            shared = matrices * dim * layer.shared + (dim if layer.shared_gate else 0)
            return cls(layer.experts, layer.run, matrices * dim * layer.hidden, dim * layer.experts + shared)
        tucker = layer.score == "tucker"
        rank, cores = (layer.rank, layer.cores) if tucker else (1, 0)
        keys = 2 * layer.key_dim * (dim + layer.heads * layer.rows * rank + 1)
        projections = dim * (layer.read_dim + layer.value_dim)
        own = keys + projections + cores * layer.heads * rank**2 + 3 * dim * layer.hidden
        return cls(layer.rows**2, layer.heads * layer.chosen, layer.read_dim + layer.value_dim, own)

    @property
    def parameters(self) -> int:
        """All elements."""
        return self.parts * self.part + self.common

    @property
    def active(self) -> int:
        """Elements that one token meets."""
        return self.taken * self.part + self.common

    def touched(self, tokens: int) -> Number:
        """Parts that so many tokens read between them, in the mean."""
        return self.parts * (1 - (1 - self.taken / self.parts) ** tokens)

    def bytes(self, tokens: int, size: Number = 2) -> Number:
        """Read for so many tokens, each element once; `size` bytes each."""
        return size * (self.touched(tokens) * self.part + self.common)
