"""Shapes that sigmoid attention is measured and compiled at, with the configs they come from."""

from pallas_kernels.shape import Shape, array

SHAPES = (
    # ViT-B/16 at 224 pixels: 196 patches and a class token, which no block divides.
    Shape(
        "vit_b16",
        "configs/vision/vit.py:b16",
        tuple(array((16, 197, 12, 64)) for _ in "qkv"),
        dict(causal=False),
    ),
    # Llama 3.2 1B and Llama 3 8B, at lengths that the paper trains language models at.
    Shape(
        "lm_1b",
        "configs/language/lm.py:1b",
        (array((2, 2048, 32, 64)), array((2, 2048, 8, 64)), array((2, 2048, 8, 64))),
        dict(causal=True),
    ),
    Shape(
        "lm_8b",
        "configs/language/lm.py:8b",
        (array((1, 4096, 32, 128)), array((1, 4096, 8, 128)), array((1, 4096, 8, 128))),
        dict(causal=True),
    ),
)
