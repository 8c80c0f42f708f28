"""Blocks of one input by four outputs that are zero, and are left out: Shen et al. 2023, arXiv:2306.16601.

    python -m experiments.compress --workdir=runs/RUN --out=runs/blocks \\
        --recipe=configs/compress/sparse_blocks.py:80

`70`, `75`, `80`, `85`, `90`
    So many of 100 blocks of every matrix of the blocks of layers, those of the least mean magnitude. What is
    left trains for 600 steps, taught by the whole network, and is stored in float32.
`80-int8`
    The same with what stays in int8, and what enters in 8 bits for every row.
`80-tiles`
    80 of 100 blocks of 128 by 128, which have to divide every matrix: what a matrix unit takes at a time.
    What is left is stored in bfloat16, and multiplied by a kernel where the platform has one.

`80` and `80-int8` were run on `vit.py:smoke` with 20 steps of training, `80-tiles` on `lm.py:smoke` widened
to 128 channels and 256 hidden ones: 20 seconds, 13 bits a parameter. No network of use was pruned by them
here, so that there is no accuracy to expect.
"""

from ml_collections import ConfigDict

SPARSITIES = (70, 75, 80, 85, 90)
VARIANTS = (*map(str, SPARSITIES), "80-int8", "80-tiles")
# As the authors' 4x1, whose weights stand to the left of what enters: one input by four outputs.
BLOCK = (1, 4)


def get_config(variant: str = "80") -> ConfigDict:
    """Returns the recipe of a variant."""
    percent, _, values = variant.partition("-")
    kernels, sparsity = (r"blocks/.*",), int(percent) / 100
    block = (128, 128) if values == "tiles" else BLOCK
    layout = dict(kind="sparse_blocks", sparsity=sparsity, block=block)
    if values == "tiles":
        layout |= dict(values="bfloat16", implementation="kernel")
    if values == "int8":
        layout |= dict(values="int8", inputs=dict(kind="token"))
    steps = (
        dict(kind="sparsify", sparsity=sparsity, block=block, kernels=kernels),
        dict(kind="recover", how=dict(steps=600)),
        dict(kind="densify"),
        dict(kind="round", layout=layout, kernels=kernels),
    )
    return ConfigDict(dict(steps=steps))
