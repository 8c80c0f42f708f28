"""A toy of timm's vision transformer, with weights from nothing but numpy."""

import numpy as np

from effjax.interop.load import family_of, leaf_specs
from effjax.interop.names import resolve
from effjax.matching import named_leaves

SOURCE = "timm:vit_tiny_patch16_224"
CONFIG = dict(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=5)


def weights(seed=0, dtype=np.float32, **changes):
    """`{their name: random array}` that fits the toy."""
    family = family_of(SOURCE)
    config = {**family.defaults, **CONFIG, **changes}
    model = family.build(config)
    entries, _ = resolve(family.names(model), named_leaves(leaf_specs(model, family.inputs(model, config))))
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for entry in entries
        for index in entry.indices()
        for name, shape in zip(entry.names(index), entry.shapes, strict=True)
    }
