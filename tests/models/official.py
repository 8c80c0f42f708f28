"""Weights, inputs and outputs of published networks that no library ships, in small recordings.

A recording holds the tensors of a toy by their published names, all drawn at random, and beside them
`__input` and `__output`, which the published code computed. Of a deep toy it holds names and shapes alone:
`drawn` makes the same numbers again.
"""

import json
import re
import zlib
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

FOLDER = Path(__file__).parent / "fixtures"


def recording(name):
    """Tensors, input and output of `NAME.npz`."""
    with np.load(FOLDER / f"{name}.npz") as data:
        tensors = dict(data)
    return tensors, tensors.pop("__input"), tensors.pop("__output")


def drawn_again(names_and_shapes):
    """The tensors of a recording that holds names and shapes, as the bytes of a JSON object."""
    return drawn({name: tuple(shape) for name, shape in json.loads(bytes(names_and_shapes)).items()})


def drawn(shapes):
    """Tensors by name, none near its initial value: each from a generator of its own, which never changes."""
    tensors = {}
    for name, shape in shapes.items():
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) > 1:
            draw = draw * np.prod(shape[1:]) ** -0.5
        else:
            draw = 0.3 * draw + name.endswith("weight")
        tensors[name] = draw.astype(np.float32)
    return tensors


def translated(tensors, rows, **sizes):
    """Our tree from their tensors; every tensor must be used.

    A row is `(theirs, ours, layout)`: `{}` in theirs counts layers, which become the first axis; several
    paths of ours are the equal parts of their first axis; the layout is an einops pattern.
    """
    tree, used = {}, set()
    for theirs, ours, layout in rows:
        names = [theirs.format(i) for i in range(99) if theirs.format(i) in tensors]
        names = names if "{}" in theirs else [theirs]
        used |= set(names)
        paths = ours if isinstance(ours, tuple) else (ours,)
        for part, path in enumerate(paths):
            arrays = [np.split(tensors[name], len(paths))[part] for name in names]
            if layout:
                known = {key: size for key, size in sizes.items() if key in re.findall(r"\w+", layout)}
                arrays = [einops.rearrange(a, layout, **known) for a in arrays]
            node = tree
            *above, leaf = path.split("/")
            for key in above:
                node = node.setdefault(key, {})
            node[leaf] = jnp.asarray(np.stack(arrays) if "{}" in theirs else arrays[0])
    assert set(tensors) == used, sorted(set(tensors) - used)
    return tree


def check(model, variables, pictures, expected):
    """Our output is theirs, and every variable of the model was given."""
    wanted = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), pictures))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, wanted)
    ours = jax.jit(model.apply)(variables, pictures)
    assert np.abs(np.asarray(ours) - expected).max() <= 1e-4 * np.abs(expected).max()
