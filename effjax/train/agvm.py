"""AGVM: modules of a network, such as backbone and heads, whose gradients are kept equally noisy.

    phi_i = 1 - cos(g_i^A, g_i^B)                        A, B: the two halves of a batch
    mu_i  <- ema mu_i + (1 - ema) sqrt(clamp((phi_1 + e) / (phi_i + e)))
    w_i   <- w_i - eta mu_i direction_i                  mu_i = 1 until `start`

The cosine of the gradients of two halves tells the share of noise in a module's gradient, whatever its size.
In large batches it falls in some modules faster than in others, where features of many places meet one head;
the anchor is the first module, usually the backbone, whose learning rate stays what it is. With an
optimiser that divides by sqrt(nu), as Adam does, the halves are divided by it too.

The halves are the even and the odd micro-batches of `config.train.accumulate`, so it must be even; nothing is
computed twice. The published code cuts the devices of a run in two halves, and divides each half by the nu
that it would give by itself; here by the one nu there is after the step.

Xue et al., "Large-batch Optimization for Dense Visual Predictions", NeurIPS 2022, arXiv:2210.11078;
bounds, e and intervals as in its published code.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.matching import match, named_leaves
from effjax.train.durations import Budget

EPSILON = 1e-6
ADAM_EPSILON = 1e-8


class ModuleScales(NamedTuple):
    """State: steps done, mu of every module, and the state of the optimiser."""

    seen: Any
    scales: Any
    inner: Any


@dataclasses.dataclass(frozen=True)
class Agvm:
    """What is kept equally noisy.

    Attributes:
      modules: a regexp for the whole paths of each module's parameters; the first is the anchor, and what
        none matches moves as it would without.
      ema: of the scales.
      every: steps between looks at the noise.
      start: when it begins, best after the warm-up, a duration such as `"5%"`.
      least, most: bounds of the quotient below the root.
    """

    modules: tuple[str, ...]
    ema: float = 0.97
    every: int = 10
    start: str = "5%"
    least: float = 0.5
    most: float = 10.0

    def __post_init__(self) -> None:
        if len(self.modules) < 2:
            raise UsageError(
                "agvm.modules needs two or more regexps: the anchor and what is compared with it."
            )
        if not 0 <= self.ema < 1 or self.every < 1 or not 0 < self.least <= 1 <= self.most:
            raise UsageError(
                f"agvm: ema={self.ema} is from 0 to below 1, every={self.every} at least 1, and 1 lies "
                f"between least={self.least} and most={self.most}."
            )

    def around(
        self, inner: optax.GradientTransformation, params: Any, budget: Budget
    ) -> optax.GradientTransformationExtraArgs:
        """The optimiser with its updates scaled; `update` takes the gradients of the halves as `halves`.

        Args:
          inner: the optimiser, learning rate and all.
          params: the parameters or their shapes.
          budget: the length of the run.

        Raises:
          UsageError: for a regexp that matches no parameter.
        """
        rules = [(pattern, number) for number, pattern in enumerate(self.modules)]
        module = named_leaves(match(rules, params, default=-1, where="agvm.modules"))
        for number, pattern in enumerate(self.modules):
            if number not in module.values():
                raise UsageError(
                    f"agvm.modules[{number}]: {pattern!r} is left no parameter by those before it."
                )
        start, optimiser = budget.steps(self.start), optax.with_extra_args_support(inner)

        def init(params: Any) -> ModuleScales:
            ones = jnp.ones((len(self.modules),))
            return ModuleScales(jnp.zeros((), jnp.int32), ones, optimiser.init(params))

        def update(
            gradient: Any, state: ModuleScales, params: Any = None, *, halves: Any, **others: Any
        ) -> tuple[Any, ModuleScales]:
            updates, after = optimiser.update(gradient, state.inner, params, **others)
            looks = (state.seen >= start) & (state.seen % self.every == 0)
            found = self._found(_noise(halves, module, _nu(after), len(self.modules)))
            scales = jnp.where(looks, self.ema * state.scales + (1 - self.ema) * found, state.scales)
            updates = jax.tree.map(
                lambda leaf, number: leaf * scales[number].astype(leaf.dtype) if number >= 0 else leaf,
                updates,
                jax.tree.unflatten(jax.tree.structure(updates), list(module.values())),
            )
            return updates, ModuleScales(state.seen + 1, scales, after)

        return optax.GradientTransformationExtraArgs(init, update)

    def _found(self, noise: Float[Array, " m"]) -> Float[Array, " m"]:
        """What the noise of this step asks for."""
        return jnp.sqrt(jnp.clip((noise[0] + EPSILON) / (noise + EPSILON), self.least, self.most))


def _nu(state: Any) -> dict[str, Array]:
    """Averages of squares by path; empty where the optimiser keeps none."""
    return named_leaves(optax.tree.get(state, "nu", default=()))


def _noise(
    halves: tuple[Any, Any], module: dict[str, int], nu: dict[str, Array], count: int
) -> Float[Array, " m"]:
    """phi of each module."""
    products = jnp.zeros((count, 3))
    for (path, a), b in zip(named_leaves(halves[0]).items(), jax.tree.leaves(halves[1]), strict=True):
        if module[path] < 0:
            continue
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        if path in nu:
            root = jnp.sqrt(nu[path]) + ADAM_EPSILON
            a, b = a / root, b / root
        parts = jnp.stack([jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)])
        products = products.at[module[path]].add(parts)
    return 1.0 - products[:, 0] / jnp.maximum(jnp.sqrt(products[:, 1] * products[:, 2]), 1e-30)
