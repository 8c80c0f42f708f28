"""Shapes that the scan is measured and compiled at, with the configs they come from."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.shape import Shape, array


def _shape(
    name: str, config: str, batch: int, length: int, inner: int, kind: Any, each: int, **options: Any
) -> Shape:
    """Inputs as the model computes them; step sizes and what is selected are float32, states have 16 numbers.

    A part is `each` channels of one row.
    """

    def of(batch: int, inner: int) -> tuple[Any, ...]:
        whole, chosen = (batch, length, inner), array((batch, length, 16), jnp.float32)
        return array(whole, kind), array(whole, jnp.float32), array((inner, 16), jnp.float32), chosen, chosen

    def part(count: int) -> tuple[Any, ...]:
        return of(1, count * each)

    return Shape(name, config, of(batch, inner), options, part, batch * inner // each)


SHAPES = (
    _shape("mamba_130m", "configs/language/mamba.py:130m", 8, 2048, 1536, jnp.bfloat16, 512),
    _shape("mamba_1.4b", "configs/language/mamba.py:1.4b", 4, 2048, 4096, jnp.bfloat16, 512),
    # Both directions of Vim-S at 224 pixels are such scans; this one looks back.
    _shape("vim_s", "configs/vision/vim.py:small", 64, 197, 768, jnp.float32, 384, reverse=True),
)
