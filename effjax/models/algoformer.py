"""AlgoFormer: a looped transformer between a transformer that prepares and one that reads out.

    P = pre(read_in(prompt))
    Y_0 = 0,   Y_{t+1} = loop(Y_t + P)
    prediction_t = read_out(post(Y_t)),    t = T - window + 1 .. T

`pre`, `loop` and `post` are stacks of decoder blocks with a norm behind them; `loop` has the same weights in
each of its T iterations, so that parameters do not depend on T and a clone may run more of them. The prompt
goes in again at each iteration. In training the last `window` iterates are predictions, and the gradient does
not reach further back, so that the iteration learns to stay where it arrives.

Without `pre` and `post` this is the looped transformer of Yang et al. 2024, and without `loop` an ordinary
one.

Gao et al., "On the Expressive Power of a Variant of the Looped Transformer", 2024. The authors published no
code; the norm behind the loop, the window and where its gradient ends are those of the published code of the
looped transformer it builds on, "Looped Transformers are Better at Learning Learning Algorithms".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, named, truncated_normal
from effjax.layers.norms import norm
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models.lm import DecoderBlock


class Trunk(nn.Module):
    """Decoder blocks and a norm; no blocks are the identity.

    Attributes:
      block: the block that the stack repeats.
      depth: number of blocks.
    """

    block: DecoderBlock
    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], train: bool = False) -> Float[Array, "b n c"]:
        """What leaves the norm."""
        if not self.depth:
            return x
        stack = Stack(self.block, self.depth, name="blocks")
        x, _ = stack(x, Context(), each=(None, {}), train=train)  # [B, N, C]
        return norm(self.block.norm, self.block.epsilon, "norm", train=train)(x)


class AlgoFormer(nn.Module):
    """Predicts a number, or a vector, at every place of a prompt of vectors.

    Attributes:
      block: the block of all three parts.
      dim: channels of a token.
      outputs: numbers predicted at each place.
      pre: blocks before the loop.
      loop: blocks in the loop; 0 means that there is none.
      post: blocks behind it.
      iterations: how often the loop runs, T.
      window: of the last iterates so many are predictions.
      truncate: whether the gradient ends where the window begins.
      position_table: rows of a learned table that is added to the prompt; 0 means there is none.
      unroll: iterations of the loop in one of the scan.
    """

    block: DecoderBlock
    dim: int = 256
    outputs: int = 1
    pre: int = 1
    loop: int = 1
    post: int = 1
    iterations: int = 20
    window: int = 15
    truncate: bool = True
    position_table: int = 0
    unroll: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.window <= self.iterations:
            raise UsageError(
                f"window={self.window} of iterations={self.iterations}: predict from at least 1 of them, and "
                f"at most all."
            )
        if self.pre + self.loop + self.post < 1 or min(self.pre, self.loop, self.post) < 0:
            raise UsageError(f"pre={self.pre}, loop={self.loop}, post={self.post}: there must be a block.")

    @nn.compact
    def __call__(
        self, prompt: Float[Array, "b n d"], train: bool = False
    ) -> Float[Array, "steps b n outputs"]:
        """Predictions of the last `window` iterates, the last one last; one where there is no loop.

        Raises:
          UsageError: for a prompt that is longer than the table of positions.
        """
        x = Dense(self.dim, (None, "embed"), name="read_in")(prompt)  # [B, N, C]
        if self.position_table:
            x = x + self._positions(prompt.shape[1]).astype(x.dtype)  # [B, N, C]
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))
        given = Trunk(self.block, self.pre, name="pre")(x, train)  # [B, N, C]
        states = self._iterates(given, train) if self.loop else given[None]  # [S, B, N, C]
        steps, batch = states.shape[:2]
        # All iterates are read out at once, as so many more prompts.
        states = states.reshape(steps * batch, *states.shape[2:])  # [S B, N, C]
        y = Trunk(self.block, self.post, name="post")(states, train)  # [S B, N, C]
        y = Dense(self.outputs, ("embed", None), name="read_out")(y)  # [S B, N, O]
        return y.reshape(steps, batch, *y.shape[1:])

    @nn.nowrap
    def _iterates(self, given: Float[Array, "b n c"], train: bool) -> Float[Array, "steps b n c"]:
        """The last `window` iterates of the loop."""

        def once(loop: nn.Module, state: Array, _: None) -> tuple[Array, Array]:
            state = loop(state + given, train)  # [B, N, C]
            return state, state

        def run(loop: nn.Module, state: Array, count: int) -> tuple[Array, Array]:
            scan = nn.scan(
                once,
                variable_broadcast="params",
                split_rngs={"params": False},
                length=count,
                unroll=min(self.unroll, count),
            )
            return scan(loop, state, None)

        loop, state = Trunk(self.block, self.loop, name="loop"), jnp.zeros_like(given)
        before = self.iterations - self.window
        if before:
            state, _ = run(loop, state, before)
            state = jax.lax.stop_gradient(state) if self.truncate else state
        return run(loop, state, self.window)[1]

    @nn.nowrap
    def _positions(self, length: int) -> Float[Array, "1 n c"]:
        if length > self.position_table:
            raise UsageError(
                f"a prompt of {length} places is longer than the {self.position_table} of position_table."
            )
        init = named(truncated_normal(0.02), ("length_table", "embed"))
        table = self.param("positions", init, (self.position_table, self.dim), jnp.float32)
        return table[None, :length]
