"""Optimisers from a config: one optax transformation, with rules that pick parameters by name.

    optimizer = dict(kind="adamw", lr=1e-3, weight_decay=0.05, schedule=dict(kind="cosine", warmup="5%"),
                     freeze=("backbone/.*",), learning_rate=((".*/head/.*", 10.0),))

Each kind is a small dataclass with its own numbers; what they share stands in `Optimizer`, which chains, for
the parameters that are not frozen,

    clip spikes -> clip by global norm -> direction of the kind -> + weight_decay m_decay w
                -> * m_rate -> * -schedule(step)

so the decay is decoupled from the direction and scaled by the learning rate, as in AdamW (arXiv:1711.05101).
Around it stand the scales of modules, see `effjax.train.agvm`, and around it all what leaves steps out at
spikes of the loss, see `effjax.train.stability`.
Rules are ordered `(regexp, value)` pairs matched against whole paths, see `effjax.matching`. No rule looks at
`ndim`: the parameters of scanned blocks carry a leading `layers` axis, so a stacked bias is no matrix.
"""

import dataclasses
import math
from typing import Any

import jax
import optax
from jaxtyping import Array
from optax import contrib

from effjax.config import part
from effjax.errors import UsageError
from effjax.matching import explain, match, named_leaves, path_of
from effjax.train.agvm import Agvm
from effjax.train.durations import Budget
from effjax.train.schedules import KINDS as SCHEDULES
from effjax.train.schedules import Constant
from effjax.train.stability import Spikes, clip_spikes, skip_spikes

Multipliers = tuple[tuple[str, float], ...]

# What multiplies features is named `kernel`; biases, norms, position, token and class tables are not.
DECAY: Multipliers = ((r"(.*/)?kernel", 1.0), (r".*", 0.0))

# What Muon takes as a matrix, and how: the trailing axes, each `in` or `out`; "" leaves a parameter to Adam.
MATRICES: tuple[tuple[str, str], ...] = (
    (r"(.*/)?([^/]*embed[^/]*|head|logits|modulation)/kernel", ""),
    (r"(.*/)?(query|key|value|subspaces)/kernel", "in out out"),
    (r"(.*/)?output/kernel", "in in out"),
    (r"(.*/)?kernel", "in out"),
    (r".*", ""),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every kind shares.

    Attributes:
      lr: the peak learning rate, which `schedule` scales.
      schedule: one of `effjax.train.schedules.KINDS`.
      clip: largest global norm of the gradient of the trained parameters; None for no clipping.
      clip_spikes: clips by the norms of the steps before, see `effjax.train.stability`; None does not.
      skip_spikes: leaves steps out whose loss is a spike; None takes all.
      agvm: keeps modules equally noisy, see `effjax.train.agvm`; None leaves them.
      weight_decay: strength of the decoupled decay.
      decay: rules that multiply `weight_decay`, read before `DECAY`: kernels yes, all else no.
      learning_rate: rules that multiply the learning rate (decay included); 1 where none matches.
      freeze: regexps of parameters that never move and have no optimiser state.
    """

    lr: float
    schedule: Any = part(SCHEDULES, default=Constant())
    clip: float | None = None
    clip_spikes: Spikes | None = None
    skip_spikes: Spikes | None = None
    agvm: Agvm | None = None
    weight_decay: float = 0.0
    decay: Multipliers = ()
    learning_rate: Multipliers = ()
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UsageError(f"lr must be positive, not {self.lr}.")
        if self.clip is not None and self.clip <= 0:
            raise UsageError(f"clip must be positive, not {self.clip}. Write None for no clipping.")

    def direction(self, params: Any) -> optax.GradientTransformation:
        """The update rule itself, without decay or learning rate, for these parameters."""
        raise NotImplementedError

    def learning_rates(self, budget: Budget) -> optax.Schedule:
        """The learning rate as a function of the steps done."""
        return self.schedule.make(self.lr, budget)

    def learning_rate_at(self, step: Any, budget: Budget) -> Any:
        """The learning rate of the step after `step` earlier ones, before any multiplier, for logs."""
        return self.learning_rates(budget)(step)

    def transformation(self, params: Any, budget: Budget) -> optax.GradientTransformation:
        """The whole optimiser as one optax transformation.

        Args:
          params: the parameters or their shapes (`jax.eval_shape`); only paths and shapes are read.
          budget: the length of the run.

        Raises:
          UsageError: for a rule that matches no parameter, or one that freezes everything.
        """
        frozen, decay, rate = self._rules(params)
        if all(jax.tree.leaves(frozen)):
            raise UsageError("freeze matches every parameter, so there is nothing to train.")
        steps = [clip_spikes(self.clip_spikes)] if self.clip_spikes is not None else []
        steps += [optax.clip_by_global_norm(self.clip)] if self.clip is not None else []
        steps.append(self.direction(params))
        if self.weight_decay:
            steps += [
                optax.masked(optax.add_decayed_weights(self.weight_decay * value), mask)
                for value, mask in _groups(decay, neutral=0.0)
            ]
        steps += [optax.masked(optax.scale(value), mask) for value, mask in _groups(rate, neutral=1.0)]
        steps.append(optax.scale_by_learning_rate(self.learning_rates(budget)))
        trained: optax.GradientTransformation = optax.chain(*steps)
        if any(jax.tree.leaves(frozen)):
            # `partition` hides the frozen leaves from the chain: no state, no share in the global norm.
            labels = jax.tree.map(lambda f: "frozen" if f else "trained", frozen)
            trained = optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
        if self.agvm is not None:
            trained = self.agvm.around(trained, params, budget)
        return trained if self.skip_spikes is None else skip_spikes(trained, self.skip_spikes)

    def _rules(self, params: Any) -> tuple[Any, Any, Any]:
        frozen = match([(p, True) for p in self.freeze], params, default=False, where="freeze")
        # Called for its error alone: a rule of the user's that matches nothing is refused, one of ours is
        # not.
        match(self.decay, params, default=0.0, where="decay")
        decay = match((*self.decay, *DECAY), params, default=0.0, where="decay", unused="allow")
        rate = match(self.learning_rate, params, default=1.0, where="learning_rate")
        return frozen, decay, rate

    def explain(self, params: Any) -> dict[str, dict[str, Any]]:
        """What the rules decide: `{path: {"frozen": ..., "decay": ..., "learning_rate": ...}}`, for printing.

        `decay` and `learning_rate` are the multipliers; a frozen parameter shows 0 for both.
        """
        frozen = explain([(p, True) for p in self.freeze], params, default=False, where="freeze")
        decay = explain((*self.decay, *DECAY), params, default=0.0, where="decay")
        rate = explain(self.learning_rate, params, default=1.0, where="learning_rate")
        return {
            path: {
                "frozen": frozen[path],
                "decay": 0.0 if frozen[path] else decay[path],
                "learning_rate": 0.0 if frozen[path] else rate[path],
            }
            for path in frozen
        }


def _groups(values: Any, neutral: float) -> list[tuple[float, Any]]:
    """`(value, mask)` for each distinct multiplier that does something; the masks do not overlap."""
    distinct = sorted(set(jax.tree.leaves(values)) - {neutral})
    return [(value, jax.tree.map(lambda v, value=value: v == value, values)) for value in distinct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """`m / (sqrt(v) + eps)`, both bias-corrected. Loshchilov and Hutter, arXiv:1711.05101."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def direction(self, params: Any) -> optax.GradientTransformation:
        """See `Optimizer.direction`."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """`sign(b1 m + (1 - b1) g)`, then `m <- b2 m + (1 - b2) g`. Chen et al., arXiv:2302.06675.

    Wants a learning rate 3 to 10 times smaller, and a decay as much larger, than AdamW.
    """

    b1: float = 0.9
    b2: float = 0.99

    def direction(self, params: Any) -> optax.GradientTransformation:
        """See `Optimizer.direction`."""
        return optax.scale_by_lion(self.b1, self.b2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Second moments as row and column means: memory of n + m for an n x m kernel. arXiv:1804.04235.

    The two largest axes are factored, where both reach `min_size`; the `layers` axis of stacked blocks is
    shorter than that and stays whole, so every layer has its own factors. The update is clipped by its root
    mean square, over all layers of a stack together. The learning rate is absolute (no scaling by the
    parameter's size), as in the use for vision transformers (arXiv:2106.04560).
    """

    decay_rate: float = 0.8
    min_size: int = 128
    clip_rms: float = 1.0
    momentum: float | None = None

    def direction(self, params: Any) -> optax.GradientTransformation:
        """See `Optimizer.direction`."""
        steps = [
            optax.scale_by_factored_rms(decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_size),
            optax.clip_by_block_rms(self.clip_rms),
        ]
        return optax.chain(*steps, *([optax.ema(self.momentum)] if self.momentum is not None else []))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """The momentum of each matrix, orthogonalised; Adam for all that is no matrix inside the network.

        m <- beta m + (1 - beta) g
        update = s * NewtonSchulz(m),   s = consistent_rms * sqrt(max(n_in, n_out))

    Jordan, "Muon", 2024; the scale `s` is that of arXiv:2502.16982: with 0.2 an update has the root mean
    square of AdamW's, so that one learning rate and one decay serve both halves. With None it is Jordan's,
    `s = sqrt(max(1, n_out / n_in))`.

    What counts as a matrix is said by name in `MATRICES`: a rule gives the trailing axes of a parameter, each
    contracted by the layer (`in`) or produced by it (`out`); axes of one role are flattened together, and
    the axes before them are a batch. So a scanned stack `[layers, C, F]` under "in out" is orthogonalised
    layer by layer, experts `[layers, experts, C, F]` expert by expert, and attention's `[C, heads, D]` is one
    matrix C x (heads D). By default: every `kernel`, except Adam for embeddings (patch embedding included),
    output heads and adaLN modulations, as for all biases, norms and tables. A parameter's number of axes
    cannot tell a stacked matrix from an attention kernel, so a model whose `query/kernel` is flat needs its
    own rule.

    Attributes:
      matrices: rules `(regexp, axes)` read before `MATRICES`; "in in in out" makes a matrix of a convolution.
      beta: of the momentum.
      iterations: of Newton-Schulz.
      b1, b2, eps: of Adam.
    """

    beta: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    consistent_rms: float | None = 0.2
    matrices: tuple[tuple[str, str], ...] = ()
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8

    def direction(self, params: Any) -> optax.GradientTransformation:
        """See `Optimizer.direction`."""
        axes = {path: spec for path, spec in self.matrix_axes(params).items() if spec}
        numbers = {
            path: dimension_numbers(spec, leaf.shape, path)
            for path, leaf in named_leaves(params).items()
            if (spec := axes.get(path))
        }

        def numbers_of(updates: Any) -> Any:
            # Called with the tree in which the other leaves are masked out, which this must look like.
            return jax.tree_util.tree_map_with_path(lambda path, _: numbers[path_of(path)], updates)

        orthogonalise = contrib.scale_by_muon(
            ns_steps=self.iterations,
            beta=self.beta,
            nesterov=self.nesterov,
            weight_dimension_numbers=numbers_of,
        )
        scale = optax.stateless(lambda updates, _: jax.tree.map(self._scale, updates, numbers_of(updates)))
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: "matrix" if path_of(path) in numbers else "other", params
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.partition({"matrix": optax.chain(orthogonalise, scale), "other": adam}, labels)

    def matrix_axes(self, params: Any) -> dict[str, str]:
        """`{path: axes}`: what the rules make of each parameter; "" is Adam's."""
        match(self.matrices, params, default="", where="matrices")  # for its error alone, as in `_rules`
        return explain((*self.matrices, *MATRICES), params, default="", where="matrices")

    def _scale(self, update: Array, numbers: contrib.MuonDimensionNumbers) -> Array:
        n_in, n_out = (math.prod(update.shape[axis] for axis in axes) for axes in numbers)
        if self.consistent_rms is None:
            return update * math.sqrt(max(1.0, n_out / n_in))
        return update * (self.consistent_rms * math.sqrt(max(n_in, n_out)))

    def explain(self, params: Any) -> dict[str, dict[str, Any]]:
        """As `Optimizer.explain`, with `matrix`: the axes, or "" where Adam does it."""
        axes = self.matrix_axes(params)
        return {path: {**row, "matrix": axes[path]} for path, row in super().explain(params).items()}


def dimension_numbers(axes: str, shape: tuple[int, ...], path: str) -> contrib.MuonDimensionNumbers:
    """Turns `"in out out"` into the axes, counted from the end, that optax orthogonalises over.

    Raises:
      UsageError: for a word that is neither, a missing role, or more words than the parameter has axes.
    """
    roles = axes.split()
    if set(roles) != {"in", "out"}:
        raise UsageError(f"matrices: {axes!r} must name axes 'in' and 'out', such as 'in out', or be empty.")
    if len(roles) > len(shape):
        raise UsageError(
            f"matrices: {path} has the shape {shape}, fewer axes than {axes!r}. Give it a rule of its own, "
            f"such as ({path!r}, 'in out')."
        )
    places = [index - len(roles) for index in range(len(roles))]
    return contrib.MuonDimensionNumbers(
        reduction_axis=tuple(p for p, role in zip(places, roles, strict=True) if role == "in"),
        output_axis=tuple(p for p, role in zip(places, roles, strict=True) if role == "out"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(Optimizer):
    """Stochastic gradient descent with heavy-ball or Nesterov momentum: `m <- momentum m + g`."""

    momentum: float = 0.9
    nesterov: bool = False

    def direction(self, params: Any) -> optax.GradientTransformation:
        """See `Optimizer.direction`."""
        return optax.trace(self.momentum, nesterov=self.nesterov) if self.momentum else optax.identity()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Still(Optimizer):
    """Nothing moves, and there is no state: for weights that are stored in codes."""

    lr: float = 1.0

    def transformation(self, params: Any, budget: Budget) -> optax.GradientTransformation:
        """See `Optimizer.transformation`."""
        return optax.set_to_zero()


KINDS = {
    "adamw": AdamW,
    "lion": Lion,
    "adafactor": Adafactor,
    "muon": Muon,
    "sgd": Momentum,
    "still": Still,
}
