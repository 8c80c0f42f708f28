"""Keys and values as they are: one array, in the dtype of the model."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Shaped

from effjax.decoding.storage.storage import What


@dataclasses.dataclass(frozen=True)
class Plain:
    """One array; its pieces serve whatever else has a number for each slot."""

    @property
    def rewinds(self) -> bool:
        """Every slot stands for itself."""
        return True

    def empty(
        self, what: What, batch: int, slots: int, groups: int, head_dim: int, dtype: DTypeLike
    ) -> Float[Array, "b slots groups d"]:
        """Zeros."""
        return jnp.zeros((batch, slots, groups, head_dim), dtype)

    def axes(self, what: What) -> tuple[str, ...]:
        """Names of the axes."""
        return ("batch", "slots", "kv_heads", "head_dim")

    def append(
        self,
        held: Shaped[Array, "b slots *rest"],
        new: Shaped[Array, "b n *rest"],
        written: Int[Array, "*b"],
        count: Int[Array, " b"] | None = None,
    ) -> Shaped[Array, "b slots *rest"]:
        """Writes `n` slots behind the first `written`, of all sequences or of each."""
        put = jax.lax.dynamic_update_slice_in_dim
        if written.ndim == 1:
            return jax.vmap(put, (0, 0, 0, None))(held, new.astype(held.dtype), written, 0)
        return put(held, new.astype(held.dtype), written, axis=1)

    def put(
        self,
        held: Shaped[Array, "b slots *rest"],
        new: Shaped[Array, "b n *rest"],
        slots: Int[Array, "b n *g"],
    ) -> Shaped[Array, "b slots *rest"]:
        """Writes these slots, the same of all heads or others of each group."""
        return held.at[_index(slots)].set(new.astype(held.dtype))

    def read(self, held: Float[Array, "b slots groups d"]) -> Float[Array, "b slots groups d"]:
        """All slots."""
        return held

    def read_at(
        self, held: Shaped[Array, "b slots *rest"], slots: Int[Array, "b m *g"]
    ) -> Shaped[Array, "b m *rest"]:
        """These slots, the same of all heads or others of each group."""
        return held[_index(slots)]


def _index(slots: Int[Array, "b n *g"]) -> tuple[Array, ...]:
    """Numbers of the sequence, the slot and, where heads differ, the group."""
    batch = jnp.arange(slots.shape[0])
    if slots.ndim == 2:
        return batch[:, None], slots
    return batch[:, None, None], slots, jnp.arange(slots.shape[2])[None, None, :]
