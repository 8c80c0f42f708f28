"""Compressed experts as a step: of the experts that a token chooses, some become vectors.

A trained mixture becomes `effjax.ffn.compressed_mixture`: its experts and its router stay as they are, the
vectors start at zero, and what the layer gives is that of its main experts alone until it is trained. The
paper trains everything on the task's own loss afterwards: `recover` as the next step, or `train.start`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError
from effjax.ffn.compressed_mixture import CompressedMixture, Vectors
from effjax.ffn.mixture import Mixture


@dataclasses.dataclass(frozen=True)
class CompressedExperts:
    """Replaces the mixtures of a network.

    Attributes:
      main: how many of a token's experts stay; None means half of those it chooses, rounded up.
      vectors: what the others become: a vector a matrix, one for the token, or nothing.
    """

    main: int | None = None
    vectors: Vectors = "matrix"

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Replaces every mixture.

        Raises:
          UsageError: for a network whose layers cannot be taken apart, or that has no mixture.
        """
        layers = [self._compressed(layer) for layer in take_apart(subject)]
        changed = [layer.block.ffn for layer in layers if _is_mixture(layer, CompressedMixture)]  # type: ignore[attr-defined]
        if not changed:
            raise UsageError("no layer has a mixture of experts to compress.")
        ffn = changed[0]
        calibration.report(f"{len(changed)} layers run {ffn.main} of {ffn.chosen} experts a token.")
        return put_together(subject, layers)

    def _compressed(self, layer: Layer) -> Layer:
        if not _is_mixture(layer, Mixture):
            return layer
        ffn = compressed(layer.block.ffn, self.main, self.vectors)  # type: ignore[attr-defined]
        held = layer.params["ffn"]
        width = held["expand_kernel"].shape[-2]
        started = jax.eval_shape(lambda: meta.unbox(ffn.init(jax.random.key(0), jnp.zeros((1, width)))))
        added = {
            name: jnp.zeros(leaf.shape, leaf.dtype)
            for name, leaf in started["params"].items()
            if name not in held
        }
        variables = {**layer.variables, "params": {**layer.params, "ffn": {**held, **added}}}
        block = layer.block.clone(ffn=ffn, parent=None, name=None)
        return dataclasses.replace(layer, block=block, variables=variables)


def compressed(ffn: Mixture, main: int | None = None, vectors: Vectors = "matrix") -> CompressedMixture:
    """The definition of a mixture whose last chosen experts are vectors.

    Args:
      ffn: its parent.
      main: how many are run; None means half of those that are chosen, rounded up.
      vectors: what the others are.

    Raises:
      UsageError: where experts choose tokens, or for more main experts than are chosen.
    """
    own = {"parent", "name"}
    fields: dict[str, Any] = {
        field.name: getattr(ffn, field.name) for field in dataclasses.fields(ffn) if field.name not in own
    }
    return CompressedMixture(**fields, main=-(-ffn.chosen // 2) if main is None else main, vectors=vectors)


def _is_mixture(layer: Layer, kind: type[nn.Module]) -> bool:
    return type(getattr(layer.block, "ffn", None)) is kind
