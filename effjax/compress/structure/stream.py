"""Channels of the stream: what every layer reads from and adds to, taken out of all of them at once.

    W_in [C, ..] -> W_in[kept],    W_out [.., C] -> W_out[.., kept],    norms, tables and tokens likewise

Which axes of which parameters are the stream's follows from the definition: they are those whose length
changes when the width does, and heads and hidden units stay as many as they are. Norms then count the
channels that are left: with a norm that takes no mean off, zeros in the place of a channel are the same but
for a factor; with one that does there is no such network of the whole width.

One of the five kinds of units of Yang et al. 2023, arXiv:2110.04869 (NViT), section 3.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from effjax.compress.storage.trees import stored_in
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.subject import Subject
from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.lm import LM
from effjax.models.vit import ViT

# By the path of a variable, in its collection.
Axes = Mapping[str, tuple[int, ...]]


def stream_width(subject: Subject) -> int:
    """How many channels the stream has.

    Raises:
      UsageError: for a network whose stream cannot be narrowed.
    """
    model = subject.model
    if not isinstance(model, ViT | LM):
        raise UsageError(
            f"{type(model).__name__} has a stream that cannot be narrowed: its stages, or positions computed "
            "from the width, hold to it. ViT and LM have others."
        )
    return model.dim


def stream_axes(subject: Subject) -> Axes:
    """The axes that run over channels of the stream, of every variable that has any.

    Raises:
      UsageError: for a network whose width is not its own to change.
    """
    wide = _pinned(subject)
    width = wide.model.dim
    if width < 2:
        raise UsageError("a stream of one channel has none to lose.")
    narrow = wide.with_model(wide.model.clone(dim=width - 1), wide.variables)
    before, after = _shapes(wide), _shapes(narrow)
    found = {}
    for path, shape in before.items():
        changed = tuple(i for i, (a, b) in enumerate(zip(shape, after[path], strict=True)) if a != b)
        if any((shape[i], after[path][i]) != (width, width - 1) for i in changed):
            raise UsageError(
                f"{path} {list(shape)} follows the width {width} in another way than channel by channel: its "
                "network keeps its stream."
            )
        if changed:
            found[path] = changed
    return found


def stream_sums(numbers: Any, axes: Axes) -> Float[Array, " channels"]:
    """Sums numbers over everything that belongs to a channel; what belongs to it twice counts once.

    Args:
      numbers: a tree like the parameters.
      axes: of the network.
    """
    flat = flatten_dict({"params": numbers}, sep="/")
    total = jnp.zeros(())
    for path, own in axes.items():
        if path not in flat:
            continue
        x = flat[path].astype(jnp.float32)
        for number, axis in enumerate(own):
            total = total + jnp.sum(x, axis=tuple(i for i in range(x.ndim) if i != axis))  # [C]
            for other in own[:number]:
                both = jnp.diagonal(x, axis1=other, axis2=axis)  # [..., C]
                total = total - jnp.sum(both, axis=tuple(range(both.ndim - 1)))
    return total


def keep_channels(subject: Subject, channels: Sequence[int] | np.ndarray) -> Subject:
    """The network whose stream has these channels alone.

    Args:
      subject: to be cut.
      channels: numbers, in the order that they shall have.

    Raises:
      UsageError: for no channels, or numbers that are not there, or a network that keeps its stream.
    """
    axes = stream_axes(subject)
    wide, chosen = _pinned(subject), np.asarray(channels, np.int32)
    width = wide.model.dim
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= width:
        raise UsageError(f"a stream of {width} channels keeps at least one, and none such as {chosen}.")
    flat = dict(flatten_dict(dict(wide.variables), sep="/"))
    for path, own in axes.items():
        for axis in own:
            flat[path] = jnp.take(flat[path], chosen, axis=axis)
    return wide.with_model(wide.model.clone(dim=len(chosen)), unflatten_dict(flat, sep="/"))


def _pinned(subject: Subject) -> Subject:
    """The same network, whose heads and hidden units are numbers and no ratios of its width."""
    stream_width(subject)
    for path in stored_in(subject.params):
        raise UsageError(f"{path} is stored in codes already: take structures out before.")
    made = []
    for layer in take_apart(subject):
        parts: dict[str, Any] = {}
        mixer, ffn = getattr(layer.block, "mixer", None), getattr(layer.block, "ffn", None)
        if type(mixer) not in (Attention, type(None)) or type(ffn) not in (MLP, Gated, type(None)):
            other = mixer if type(mixer) not in (Attention, type(None)) else ffn
            raise UsageError(f"{layer.where} has {type(other).__name__}, whose width is that of the stream.")
        if getattr(layer.block, "width", None) is not None:
            raise UsageError(f"{layer.where} is stitched: its width is that of two streams.")
        if mixer is not None:
            size = layer.params["mixer"]["query"]["kernel"].shape[-1]
            parts["mixer"] = mixer.clone(head_dim=size, parent=None, name=None)
        if type(ffn) is MLP:
            hidden = layer.params["ffn"]["contract"]["kernel"].shape[0]
            parts["ffn"] = ffn.clone(hidden=hidden, parent=None, name=None)
        made.append(dataclasses.replace(layer, block=layer.block.clone(**parts, parent=None, name=None)))
    return put_together(subject, made)


def _shapes(subject: Subject) -> dict[str, tuple[int, ...]]:
    made = jax.eval_shape(lambda: meta.unbox(subject.task.init(jax.random.key(0), subject.example)))
    return {path: leaf.shape for path, leaf in flatten_dict(dict(made), sep="/").items()}
