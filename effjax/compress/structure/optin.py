"""OPTIN: a unit is worth what all that comes behind it loses without it.

    I_u = sum_{l >= l_u} L(F_l, F_l^u) / mean_u' + lambda D(y, y^u) / mean_u'
    L(F, G) = mean_ij ((F' F'^T)_ij - (G' G'^T)_ij)^2       rows of unit length, some of all tokens of a batch

F_l is the stream behind layer l, with the unit and without; D is KL(y || y^u) of logits, and of a denoiser
the mean squared difference. Both sums are weighed by their means over all units, so that lambda is the share
of the one in the other whatever the network is. Nothing is trained, and nothing differentiated.

All units are one compiled program, to which the number of the unit is data.

Source: Khaki and Plataniotis, "The Need for Speed: Pruning Transformers with One Recipe", ICLR 2024,
arXiv:2403.17921, section 3; the manifold distillation is that of Hao et al. 2022.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.compress.blocks import evaluated
from effjax.compress.recovery import apart
from effjax.compress.structure.layers import Layer
from effjax.compress.structure.masks import but_one, mask_shape, masked
from effjax.compress.structure.scores import Scores, wanted
from effjax.compress.structure.units import Kind
from effjax.compress.subject import Batch, Calibration, Subject
from effjax.compress.trajectory import asked
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Optin:
    """The error along the trajectory.

    Attributes:
      batches: of training data.
      output: lambda, what the output counts beside the features; 0 leaves it out.
      temperature: of the logits.
      rows: tokens of a batch, drawn anew for each, whose relations are compared; at most all.
      together: units in one pass of the network.
    """

    batches: int = 1
    output: float = 0.1
    temperature: float = 1.0
    rows: int = 768
    together: int = 16

    def __post_init__(self) -> None:
        if min(self.batches, self.rows, self.together) < 1 or self.output < 0 or self.temperature <= 0:
            raise UsageError(
                f"batches={self.batches}, rows={self.rows} and together={self.together} are at least 1, "
                f"output={self.output} not negative and temperature={self.temperature} above 0."
            )

    def score(
        self, subject: Subject, layers: Sequence[Layer], kinds: Sequence[Kind], calibration: Calibration
    ) -> Scores:
        """Runs the network without each unit.

        Raises:
          UsageError: for channels of queries and keys, which give nothing by themselves, and of the stream,
            without which the norms change.
        """
        if "qk" in kinds or "stream" in kinds:
            raise UsageError(
                "no factor silences a unit of qk or a channel of the stream: score heads, value or hidden by "
                "optin."
            )
        shapes = {(at, kind): mask_shape(layers[at], kind) for at, kind in wanted(layers, kinds)}
        features, output = self.errors(subject, shapes, calibration)
        worth = _by_mean(features) + self.output * _by_mean(output)  # [units]
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        parts = np.split(worth, ends[:-1])
        return {
            place: jnp.asarray(part.reshape(shape), jnp.float32)
            for (place, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def errors(
        self,
        subject: Subject,
        shapes: Mapping[tuple[int, Any], tuple[int, ...]],
        calibration: Calibration,
    ) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, " units"]]:
        """How far features and output are from the whole network's without each unit, over all batches.

        Args:
          subject: the network.
          shapes: of the units by layer and kind.
          calibration: the training data.
        """
        count = sum(map(math.prod, shapes.values()))
        passes = math.ceil(count / self.together)
        numbers = np.full((passes, self.together), -1)
        numbers.ravel()[:count] = np.arange(count)
        # In front the network with all units: what is compared comes out of one program.
        crowds = jnp.asarray(np.concatenate([np.full((passes, 1), -1), numbers], axis=1))  # [P, 1 + T]

        @jax.jit
        def errors(variables: Any, crowds: Array, batch: Batch, key: Array) -> tuple[Array, Array]:
            ask = asked(subject, variables, batch)

            def seen(number: Array) -> tuple[list[Array], Array]:
                network = masked(subject, variables, but_one(shapes, number))
                output, features = ask(network)
                return [relations(x, self.rows, key) for x in features[1:]], output

            def crowd(numbers: Array) -> tuple[Array, Array]:
                features, output = jax.vmap(seen)(numbers)
                far = [jnp.mean(jnp.square(m - m[:1]), axis=(1, 2)) for m in features]  # [1 + T]
                without = lambda y: apart(subject, y, output[0], self.temperature, batch.get("weights"))  # noqa: E731
                return sum(far[1:], start=far[0])[1:], jax.vmap(without)(output[1:])

            features, output = jax.lax.map(crowd, crowds)
            return features.ravel(), output.ravel()

        total = np.zeros((2, count))
        for number, batch in enumerate(calibration.first(self.batches)):
            key = jax.random.fold_in(calibration.key, number)
            found = errors(subject.variables, crowds, evaluated(batch), key)
            total += np.asarray(found, np.float64)[:, :count]
        return total[0], np.maximum(total[1], 0.0)


def relations(x: Float[Array, "b *places c"], rows: int, key: Array) -> Float[Array, "r r"]:
    """Products of some tokens with each other, each of unit length: what a rotation of channels leaves.

    Args:
      x: tokens.
      rows: how many, of all examples.
      key: which.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # [R, C]
    if rows < len(flat):
        flat = flat[jax.random.permutation(key, len(flat))[:rows]]
    size = jnp.linalg.norm(flat, axis=-1, keepdims=True)  # [R, 1]
    unit = flat / jnp.maximum(size, 1e-12)
    return unit @ unit.T  # [R, R]


def _by_mean(values: Float[np.ndarray, " units"]) -> Float[np.ndarray, " units"]:
    """Shares of the mean; where no unit matters, nothing."""
    mean = values.mean()
    return values / mean if mean > 0 else values
