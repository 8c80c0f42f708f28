"""The architectures whose weights can be read and written, by the name a user gives them.

`timm:<architecture>`, `transformers:<model_type>`, `diffusers:<class name>`, and `official:<name>` for the
checkpoints that authors publish beside their papers.
"""

from effjax.interop.families import (
    autoencoder,
    cswin,
    decoder,
    dit,
    gpt,
    lowformer,
    mamba,
    nextvit,
    timm_convnext,
    timm_focalnet,
    timm_inception,
    timm_poolformer,
    timm_swin,
    transformers_clip,
    transformers_convolution,
    transformers_dinat,
    transformers_swin,
    transformers_vit,
    vit,
)
from effjax.interop.family import Family

_TIMM = (
    timm_convnext,
    timm_focalnet,
    timm_inception,
    timm_poolformer,
    timm_swin,
    lowformer,
    nextvit,
    vit,
)
_TRANSFORMERS = (
    decoder,
    gpt,
    mamba,
    transformers_clip,
    transformers_convolution,
    transformers_dinat,
    transformers_swin,
    transformers_vit,
)
_DIFFUSERS = autoencoder, dit
_OFFICIAL = cswin, dit

FAMILIES: dict[str, Family] = {
    **{f"timm:{name}": family for module in _TIMM for name, family in module.TIMM.items()},
    **{
        f"transformers:{name}": family
        for module in _TRANSFORMERS
        for name, family in module.TRANSFORMERS.items()
    },
    **{f"diffusers:{name}": family for module in _DIFFUSERS for name, family in module.DIFFUSERS.items()},
    **{f"official:{name}": family for module in _OFFICIAL for name, family in module.OFFICIAL.items()},
}
