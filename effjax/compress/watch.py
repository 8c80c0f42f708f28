"""What enters every kernel while a network runs: one pass over calibration batches, for any model.

A kernel is put into `Watched`, which multiplies as before and hands what entered it, summed up on device, to
the host. Definitions know nothing of it, and it works inside a scan over layers: each layer's slice carries
its number.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from effjax.compress.storage.trees import replaced
from effjax.compress.subject import Batch, Subject, leaf_at
from effjax.layers.stored import Place, Stored

Summary = Callable[[Float[Array, "..."]], Any]


@flax.struct.dataclass
class Watched(Stored):
    """A kernel that tells what enters it.

    Attributes:
      kernel: the array, or what is stored in its place.
      layer: its number among those in front, `[*front]` int; sliced as the kernel is.
      path: of the kernel.
      place: shapes.
      summary: what the host is told of the rows that enter.
      tell: `(path, layer, summary)` on the host.
      entire: whether the summary is of what enters as it stands, `[..., K]`, also of the maps that enter a
        convolution, and not of the rows `[R, K]` of products alone.
    """

    kernel: Any
    layer: Any
    path: str = flax.struct.field(pytree_node=False)
    place: Place = flax.struct.field(pytree_node=False)
    summary: Summary = flax.struct.field(pytree_node=False)
    tell: Callable[..., None] = flax.struct.field(pytree_node=False)
    entire: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.kernel.shape

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The array; what it is then multiplied with is not seen."""
        return self.kernel.whole(dtype) if isinstance(self.kernel, Stored) else self.kernel.astype(dtype)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Tells, and multiplies."""
        lead = x.shape[: x.ndim - len(self.place.ins)] if self.entire else (-1,)
        seen = x.reshape(*lead, self.place.matrix[0])  # [..., K] or [R, K]
        jax.debug.callback(self._told, self.layer, self.summary(seen))
        if isinstance(self.kernel, Stored):
            return self.kernel.product(x)
        ins = len(self.place.ins)
        if self.place.turned:
            axes = tuple(range(x.ndim - ins, x.ndim)), tuple(range(-ins % self.kernel.ndim, self.kernel.ndim))
        else:
            axes = tuple(range(x.ndim - ins, x.ndim)), tuple(range(ins))
        return jax.lax.dot_general(x, self.kernel.astype(x.dtype), (axes, ((), ())))

    def entering(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Tells of what enters a convolution, where it is asked."""
        if self.entire:
            jax.debug.callback(self._told, self.layer, self.summary(x))
        return self.kernel.entering(x) if isinstance(self.kernel, Stored) else x

    def take(self, rows: Any) -> Float[Array, "*n c"]:
        """Rows of a table."""
        return self.kernel.take(rows) if isinstance(self.kernel, Stored) else self.kernel[rows]

    def _told(self, layer: Any, summary: Any) -> None:
        self.tell(self.path, int(layer), jax.tree.map(np.asarray, summary))


def watch(
    subject: Subject,
    places: Mapping[str, Place],
    batches: Iterable[Batch],
    summary: Summary,
    add: Callable[[Any, Any], Any],
    entire: bool = False,
) -> dict[str, list[Any]]:
    """Runs the network in evaluation and sums up what enters its kernels.

    Args:
      subject: the network.
      places: which kernels are watched.
      batches: as the task's metrics take them.
      summary: of the rows that enter a kernel at once, on device.
      add: two summaries as one, on the host, the older first.
      entire: whether the summary is of what enters as it stands, see `Watched`.

    Returns:
      By path, the first that was entered first, the summary of every matrix in front, in order; a kernel that
      nothing entered has None.
    """
    told: dict[str, dict[int, Any]] = collections.defaultdict(dict)

    def tell(path: str, layer: int, new: Any) -> None:
        before = told[path].get(layer)
        told[path][layer] = new if before is None else add(before, new)

    made = {}
    for path, place in places.items():
        layer = jnp.arange(int(np.prod(place.front)), dtype=jnp.int32).reshape(place.front)
        made[path] = Watched(leaf_at(subject.params, path), layer, path, place, summary, tell, entire)
    variables = {**subject.variables, "params": replaced(subject.params, made)}
    run = jax.jit(subject.task.metrics)
    for batch in batches:
        jax.block_until_ready(run(variables, dict(batch)))
    jax.effects_barrier()
    order = [*told, *(path for path in places if path not in told)]
    return {
        path: [told[path].get(layer) for layer in range(int(np.prod(places[path].front)))] for path in order
    }
