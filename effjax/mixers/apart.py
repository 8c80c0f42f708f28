"""A mixer within runs of tokens that do not see each other.

    y[i n : (i + 1) n] = mixer(x[i n : (i + 1) n])                 for every run i of n tokens

What does not mix tokens around it need not know: norms, modulation and FFN work on the whole sequence.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.mixers.context import Context


class Apart(nn.Module):
    """Gives each run of a sequence to a mixer by itself; its parameters are the mixer's, under their names.

    Attributes:
      mixer: what mixes a run.
      length: tokens of a run; it must divide the sequence.
    """

    mixer: nn.Module
    length: int

    def setup(self) -> None:
        """Puts the mixer's parameters in place of its own, of which it has none."""
        self.inner = self.mixer.clone(parent=None, name=None)
        nn.share_scope(self, self.inner)

    def __call__(
        self, x: Float[Array, "b n c"], context: Context, train: bool = False
    ) -> Float[Array, "b n c"]:
        """Mixes tokens within runs; the context must say nothing of single tokens."""
        runs = x.reshape(-1, self.length, x.shape[-1])  # [B runs, length, C]
        mixed: Array = self.inner(runs, context, train=train)  # [B runs, length, C]
        return mixed.reshape(x.shape)
