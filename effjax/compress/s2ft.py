"""Structured sparse fine-tuning: a few heads and hidden channels of a trained network are tuned.

    W' = W + scatter(rows, D)            D [s, o]: what is added to s rows of W [i, o], from zero
    y = x W',    dx = dy W'^T,    dD = x_1^T dy,     x_1 = x[:, rows]

Whole rows of the matrices that close a branch are tuned: those that a chosen head of attention enters by
(all its channels), or a chosen hidden unit of a perceptron. The backward pass is partial: of what enters a
matrix only the columns x_1 are kept, where training all of W keeps x, and neither the gradient of W nor
moments of it ever exist.

    >>> rows = chosen(places, shares, key)                         # which, fixed from then on
    >>> changes = unchanged(places, rows)                          # D, trained alone
    >>> variables = {"params": partly(params, changes, rows)}      # multiplies as above in any layer
    >>> tuned = merged(params, changes, rows)                      # parameters of the same model

A tuned model is its base and `adapters` of rows, which are put in and taken out again exactly; adapters of
other rows add up, and `for_users` multiplies by those of many users at once.

Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS
2024, arXiv:2412.06289. There heads and channels are permuted in all matrices that they run through, so that
the tuned rows lie side by side; here rows are gathered where they are, and no matrix changes its order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from effjax.compress.storage.trees import choose, replaced
from effjax.compress.subject import leaf_at
from effjax.errors import UsageError
from effjax.layers.stored import Place, Stored

Shares = Sequence[tuple[str, float]]

# The authors' recipes for Llama tune 3 of 100 hidden channels and no head.
SHARES: Shares = ((r"(.*/)?ffn/contract/kernel", 0.03),)


def units_of(places: Mapping[str, Place], shares: Shares) -> dict[str, int]:
    """How many heads (hidden channels) of each kernel are tuned, by path.

    Args:
      places: the kernels of the model.
      shares: `(regexp, share)` rules on their paths.

    Raises:
      UsageError: for a rule that matches no kernel, a share outside (0, 1], or one that is less than a unit.
    """
    made = {}
    for path, share in choose(list(shares), places, "shares").items():
        if not 0 < share <= 1:
            raise UsageError(f"shares: {share} for {path} is a share above 0, to 1.")
        if places[path].turned:
            raise UsageError(f"shares: {path} is a table, whose rows are not inputs. Leave it out.")
        units = places[path].ins[0]
        made[path] = round(share * units)
        if not made[path]:
            raise UsageError(
                f"shares: {share} of the {units} units of {path} is not one. Give more, or leave it out."
            )
    return made


def chosen(
    places: Mapping[str, Place],
    shares: Shares,
    key: PRNGKeyArray,
    worth: Mapping[str, Float[Array, "*front k"]] | None = None,
) -> dict[str, Any]:
    """Chooses units of every matrix, as many in each layer.

    Args:
      places: the kernels of the model.
      shares: `(regexp, share)` rules on their paths. A unit is one of the first input axis: a head, a
        channel.
      key: draws units, where nothing else is said.
      worth: of every row by path; those of the units that are worth most are taken.

    Returns:
      At the path of each kernel its rows `[*front, s]`, rising.

    Raises:
      UsageError: as `units_of`.
    """
    counts = units_of(places, shares)
    keys = jax.random.split(key, len(counts))
    made = {}
    for each, (path, count) in zip(keys, counts.items(), strict=True):
        front, (units, *inner) = places[path].front, places[path].ins
        size = math.prod(inner)
        if worth is None:
            scores = jax.random.uniform(each, (*front, units))
        else:
            scores = jnp.sum(worth[path].reshape(*front, units, size), axis=-1)  # [*front, units]
        taken = jnp.sort(jnp.argsort(-scores, axis=-1)[..., :count], axis=-1)[..., None]  # [*front, count, 1]
        within = jnp.arange(size).reshape((1,) * (len(front) + 1) + (size,))
        rows = (taken * size + within).reshape(*front, count * size)  # [*front, s]
        made[tuple(path.split("/"))] = rows.astype(jnp.int32)
    return unflatten_dict(made)


def unchanged(places: Mapping[str, Place], rows: Mapping[str, Any]) -> dict[str, Any]:
    """D above, zero: at the path of each kernel `[*front, s, *outs]`."""
    made = {}
    for path, at in flatten_dict(rows).items():
        made[path] = jnp.zeros((*at.shape, *places["/".join(path)].outs))
    return unflatten_dict(made)


@flax.struct.dataclass
class PartlyTuned(Stored):
    """A kernel of which some rows are tuned.

    Attributes:
      kernel: W, `[*front, *ins, *outs]`; it has no gradient.
      change: D, `[*front, s, *outs]`.
      rows: which, of the flattened inputs, `[*front, s]`.
    """

    kernel: Any
    change: Any
    rows: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.kernel.shape)

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """W'."""
        return _with_rows(jax.lax.stop_gradient(self.kernel), self.change, self.rows).astype(dtype)

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`, in the dtype of x."""
        outs = self.change.shape[1:]
        ins = self.shape[: len(self.shape) - len(outs)]
        lead = x.shape[: x.ndim - len(ins)]
        matrix = self.kernel.reshape(math.prod(ins), -1).astype(x.dtype)  # [K, N]
        change = self.change.reshape(len(self.rows), -1).astype(x.dtype)  # [s, N]
        y = partial_product(x.reshape(-1, len(matrix)), matrix, change, self.rows)  # [R, N]
        return y.reshape(*lead, *outs)


@jax.custom_vjp
def partial_product(
    x: Float[Array, "r k"], matrix: Float[Array, "k n"], change: Float[Array, "s n"], rows: Int[Array, " s"]
) -> Float[Array, "r n"]:
    """x W', whose backward pass keeps of x the columns that are tuned. W has no gradient."""
    return x @ _with_rows(matrix, change, rows)


def _forward(
    x: Float[Array, "r k"], matrix: Float[Array, "k n"], change: Float[Array, "s n"], rows: Int[Array, " s"]
) -> tuple[Float[Array, "r n"], tuple[Array, ...]]:
    # W' is put together again on the way back, so that W alone, which is there anyway, is kept.
    return partial_product(x, matrix, change, rows), (x[:, rows], matrix, change, rows)


def _backward(kept: tuple[Array, ...], dy: Float[Array, "r n"]) -> tuple[Any, ...]:
    tuned, matrix, change, rows = kept  # tuned: x_1 [R, s]
    return dy @ _with_rows(matrix, change, rows).T, None, tuned.T @ dy, None


partial_product.defvjp(_forward, _backward)


def _with_rows(
    kernel: Float[Array, "..."], change: Float[Array, "..."], rows: Int[Array, "*front s"]
) -> Float[Array, "..."]:
    """W' in the shape and dtype of the kernel; how many axes stand in front is how many `rows` has."""
    matrices, changes, at = _flat(kernel, change, rows)
    add = lambda matrix, change, rows: matrix.at[rows].add(change, unique_indices=True)  # noqa: E731
    return jax.vmap(add)(matrices, changes.astype(kernel.dtype), at).reshape(kernel.shape)


def _flat(
    kernel: Float[Array, "..."], change: Float[Array, "..."], rows: Int[Array, "*front s"]
) -> tuple[Float[Array, "f k n"], Float[Array, "f s n"], Int[Array, "f s"]]:
    """Kernel, changes and rows with one axis for all in front."""
    columns = math.prod(change.shape[rows.ndim :])
    front = math.prod(rows.shape[:-1])
    count = rows.shape[-1]
    return (
        kernel.reshape(front, -1, columns),
        change.reshape(front, count, columns),
        rows.reshape(front, count),
    )


def partly(params: Any, changes: Mapping[str, Any], rows: Mapping[str, Any]) -> Any:
    """The parameters with a `PartlyTuned` kernel in the place of every one that is tuned."""
    found = flatten_dict(rows)
    made = {}
    for path, at in found.items():
        name = "/".join(path)
        made[name] = PartlyTuned(leaf_at(params, name), flatten_dict(changes)[path], at)
    return replaced(params, made)


def merged(params: Any, changes: Mapping[str, Any], rows: Mapping[str, Any]) -> Any:
    """The parameters with W' in the place of W, in the dtype of each kernel."""
    tuned, found = flatten_dict(changes), flatten_dict(rows)
    made = {}
    for path, at in found.items():
        kernel = leaf_at(params, "/".join(path))
        made["/".join(path)] = _with_rows(kernel, tuned[path], at)
    return replaced(params, made)


@flax.struct.dataclass
class Adapter:
    """Rows of a kernel, as they are in the tuned model and in its base.

    Attributes:
      rows: which, `[*front, s]`.
      tuned: of W', `[*front, s, *outs]`.
      base: of W, the same shape.
    """

    rows: Any
    tuned: Any
    base: Any


def adapters(params: Any, changes: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Adapter]:
    """What of a tuned model is not its base, by the path of each kernel."""
    tuned = merged(params, changes, rows)
    made = {}
    for path, at in flatten_dict(rows).items():
        name, change = "/".join(path), flatten_dict(changes)[path]
        picked = []
        for tree in (tuned, params):
            matrices, _, flat_rows = _flat(leaf_at(tree, name), change, at)
            picked.append(jax.vmap(lambda m, r: m[r])(matrices, flat_rows).reshape(change.shape))
        made[name] = Adapter(at, *picked)
    return made


def put_in(params: Any, of: Mapping[str, Adapter]) -> Any:
    """The parameters with the rows of adapters in the place of their own.

    Raises:
      UsageError: for an adapter of a kernel of another shape.
    """
    return _set(params, {path: (each.rows, each.tuned) for path, each in of.items()})


def taken_out(params: Any, of: Mapping[str, Adapter]) -> Any:
    """The parameters as they were before `put_in`, to the bit."""
    return _set(params, {path: (each.rows, each.base) for path, each in of.items()})


def _set(params: Any, given: Mapping[str, tuple[Array, Array]]) -> Any:
    made = {}
    for path, (rows, values) in given.items():
        kernel = leaf_at(params, path)
        front, outs = rows.shape[:-1], values.shape[rows.ndim :]
        if kernel.shape[: len(front)] != front or kernel.shape[kernel.ndim - len(outs) :] != outs:
            raise UsageError(f"{path} has the shape {kernel.shape}, its adapter rows of {front} x {outs}.")
        matrices, new, at = _flat(kernel, values, rows)
        put = lambda matrix, rows, new: matrix.at[rows].set(new, unique_indices=True)  # noqa: E731
        made[path] = jax.vmap(put)(matrices, at, new.astype(kernel.dtype)).reshape(kernel.shape)
    return replaced(params, made)


def for_users(
    x: Float[Array, "u r k"],
    matrix: Float[Array, "k n"],
    changes: Float[Array, "u s n"],
    rows: Int[Array, "u s"],
) -> Float[Array, "u r n"]:
    """y_u = x_u W + x_u[:, rows_u] D_u: one product with W for all users, and a thin one for each.

    Args:
      x: rows of every user.
      matrix: W, of all.
      changes: D of every user.
      rows: of every user.
    """
    tuned = jnp.take_along_axis(x, rows[:, None, :], axis=-1)  # [U, R, s]
    return x @ matrix + tuned @ changes  # [U, R, N]
