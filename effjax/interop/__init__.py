"""Weights in and out: from timm, transformers and diffusers to our models, and back.

model, params = load_pretrained("timm:vit_small_patch16_224", "model.safetensors")
tensors = export(model, params, "timm:vit_small_patch16_224")

A model that keeps more than parameters, running averages of batch norms, comes with all its variables:

model, variables = load_variables("timm:nextvit_small", "model.safetensors")
tensors = export(model, variables, "timm:nextvit_small")
"""

from effjax.interop.converted import (
    load_converted,
    load_converted_variables,
    read_variables,
    save_converted,
)
from effjax.interop.export import export, export_to
from effjax.interop.load import load_pretrained, load_variables

__all__ = [
    "export",
    "export_to",
    "load_converted",
    "load_converted_variables",
    "load_pretrained",
    "load_variables",
    "read_variables",
    "save_converted",
]
