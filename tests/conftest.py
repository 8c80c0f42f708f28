"""The strictest settings: shapes are checked at run time, and ranks never promote silently."""

import os

# Before jax starts: a test never takes an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# Every function of the library has its shape annotations checked on every call.
install_import_hook("effjax", "beartype.beartype")
