"""The strictest settings: shapes are checked at run time, and ranks never promote silently."""

import os
from pathlib import Path

# The embedded data sets are prepared once for all tests, and nothing is written into anybody's home.
os.environ["TFDS_DATA_DIR"] = str(Path(__file__).resolve().parents[1] / ".testdata")
# Before jax starts: a test never takes an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are compiled once and run for milliseconds: cheap code is the fast choice.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
# Every function of the library has its shape annotations checked on every call.
install_import_hook("effjax", "beartype.beartype")
