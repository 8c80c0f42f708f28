"""Shapes that sigmoid attention is measured and compiled at, with the configs they come from."""

import jax
import jax.numpy as jnp

from pallas_kernels.shape import Shape, array


def _shape(
    name: str, config: str, batch: int, length: int, heads: int, groups: int, size: int, packed: bool = False
) -> Shape:
    def arrays(batch: int, groups: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        keys = array((batch, length, groups, size))
        queries = array((batch, length, groups * each, size))
        return queries, keys, keys, *([array((batch, length), jnp.int32)] if packed else [])

    each = heads // groups
    # Heads that share no keys come in pairs.
    pair = 2 if each == 1 else 1
    options = dict(causal=config.startswith("configs/language"))
    whole = arrays(batch, groups)
    return Shape(name, config, whole, options, lambda count: arrays(1, pair * count), batch * groups // pair)


SHAPES = (
    # ViT-B/16 at 224 pixels: 196 patches and a class token, which no block divides.
    _shape("vit_b16", "configs/vision/vit.py:b16", 16, 197, 12, 12, 64),
    # Llama 3.2 1B and Llama 3 8B, at the lengths at which the paper trains language models; documents are
    # packed in the rows of the first, and the second has rows of one document.
    _shape("lm_1b", "configs/language/lm.py:1b", 2, 2048, 32, 8, 64, packed=True),
    _shape("lm_8b", "configs/language/lm.py:8b", 1, 4096, 32, 8, 128),
)
