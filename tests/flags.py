"""Flags of XLA that make a program quickly, not a quick program."""

import importlib.metadata

QUICK_TO_COMPILE = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if tuple(int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2]) < (0, 11):
    # A third less time than by MLIR; newer versions know no other way, and stop at a flag they do not know.
    QUICK_TO_COMPILE += ["--xla_cpu_use_fusion_emitters=false", "--xla_llvm_force_inline_before_split=false"]
