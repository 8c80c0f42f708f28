"""In-context regression: prompts of examples of a function that is drawn anew for each, with their answers.

    regression        x_1, y_1, .., x_k, y_k      y_i = w . phi(x_i) + noise,   predict y_i at x_i
    autoregression    x_1, x_2, .., x_k           x_{t+1} = A [phi(x_{t-q+1}), .., phi(x_t)] + noise,
                                                  predict x_{t+1} at x_t

`x`, the weights `w` and `A`, and the noise are normal. `phi`, the representation, is a perceptron with leaky
ReLUs that is the same in all prompts: a model learns it in training, and the weights on it from each prompt.
Without layers it is the identity.

Tasks: those that the abstract of Gao et al. 2024 (AlgoFormer) names; representations as in Guo et al., "How
Do Transformers Learn In-Context Beyond Simple Functions?", 2024. Prompts interleave as in Garg et al. 2022: a
`y` stands in the first channel of a token of its own.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from effjax.data.records import Example, Metadata
from effjax.errors import UsageError

_LEAK = 0.01


@dataclasses.dataclass(frozen=True)
class InContext:
    """What both kinds have in common.

    Attributes:
      dims: channels of `x`.
      examples_per_prompt: how many `x` a prompt has.
      layers: of the representation; 0 is the identity.
      noise: standard deviation of what is added to the answers.
      examples: prompts of an epoch.
      seed: of the prompts; another one for evaluation than for training.
      representation: seed of the representation.
    """

    dims: int = 20
    examples_per_prompt: int = 41
    layers: int = 3
    noise: float = 0.0
    examples: int = 2**18
    seed: int = 0
    representation: int = 0

    def __post_init__(self) -> None:
        for name, least in (("dims", 1), ("examples_per_prompt", 1), ("layers", 0), ("examples", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.noise < 0:
            raise UsageError(f"noise={self.noise} must not be negative.")

    @functools.cached_property
    def matrices(self) -> tuple[Float[np.ndarray, "d d"], ...]:
        """The layers of the representation: orthogonal, so that it keeps lengths up to its kinks."""
        rng = np.random.Generator(np.random.PCG64([self.representation, 1]))
        return tuple(
            np.linalg.qr(rng.normal(size=(self.dims, self.dims)))[0] * np.sqrt(2.0)
            for _ in range(self.layers)
        )

    def phi(self, x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
        """The representation."""
        for matrix in self.matrices:
            x = x @ matrix
            x = np.where(x > 0, x, _LEAK * x)
        return x


@dataclasses.dataclass(frozen=True)
class Regression(InContext):
    """A linear function of the representation, of one number."""

    def open(self) -> "PromptReader":
        """Prompts of `2 examples_per_prompt - 1` places: the last `x` has no answer behind it."""
        return PromptReader(self, self.make)

    def make(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws inputs `[N, d]`, targets `[N, 1]` and weights `[N]`."""
        count, dims = self.examples_per_prompt, self.dims
        x = rng.normal(size=(count, dims))
        y = self.phi(x) @ rng.normal(size=dims) + self.noise * rng.normal(size=count)
        inputs = np.zeros((2 * count, dims))
        inputs[::2], inputs[1::2, 0] = x, y
        targets = np.zeros((2 * count, 1))
        targets[::2, 0] = y
        weights = (np.arange(2 * count) % 2 == 0).astype(np.float64)
        return inputs[:-1], targets[:-1], weights[:-1]


@dataclasses.dataclass(frozen=True)
class Autoregression(InContext):
    """A sequence in which each vector is a linear function of the representations of the last few.

    These are brought to a mean square of 1, or sequences would vanish or grow without bound.

    Attributes:
      order: how many it depends on, q.
    """

    order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.order < self.examples_per_prompt:
            raise UsageError(
                f"order={self.order} must be at least 1, and examples_per_prompt larger than it."
            )

    def phi(self, x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
        """The representation, of mean square 1."""
        x = super().phi(x)
        return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))

    def open(self) -> "PromptReader":
        """Prompts of `examples_per_prompt - 1` places, of which those before the order have no weight."""
        return PromptReader(self, self.make)

    def make(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws inputs `[N, d]`, targets `[N, d]` and weights `[N]`."""
        count, dims, order = self.examples_per_prompt, self.dims, self.order
        a = rng.normal(size=(order * dims, dims)) / np.sqrt(order * dims)
        x = np.zeros((count, dims))
        x[:order] = rng.normal(size=(order, dims))
        for t in range(order, count):
            x[t] = self.phi(x[t - order : t]).reshape(-1) @ a + self.noise * rng.normal(size=dims)
        return x[:-1], x[1:], (np.arange(count - 1) >= order - 1).astype(np.float64)


class PromptReader:
    """Draws prompts as they are asked for: number `i` is a function of the seed and `i` alone."""

    def __init__(
        self,
        definition: InContext,
        make: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]],
    ) -> None:
        self._definition, self._make = definition, make
        self.metadata = Metadata(identity=repr(definition))

    def __len__(self) -> int:
        return self._definition.examples

    def __getitem__(self, index: int) -> Example:
        rng = np.random.Generator(np.random.Philox(key=[self._definition.seed, index]))
        names = ("prompt", "targets", "weights")
        made = zip(names, self._make(rng), strict=True)
        return {name: value.astype(np.float32) for name, value in made}
