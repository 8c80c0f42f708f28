"""The architectures whose weights can be read and written, by the name a user gives them.

`timm:<architecture>`, `transformers:<model_type>`, `diffusers:<class name>`.
"""

from effjax.interop.families import decoder, gpt, mamba, vit
from effjax.interop.family import Family

FAMILIES: dict[str, Family] = {
    **{f"timm:{name}": family for name, family in vit.TIMM.items()},
    **{
        f"transformers:{name}": family
        for table in (decoder.TRANSFORMERS, gpt.TRANSFORMERS, mamba.TRANSFORMERS)
        for name, family in table.items()
    },
}
