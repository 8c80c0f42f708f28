"""Flags of XLA that make a program quickly, not a quick program."""

import importlib.metadata
import platform

QUICK_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # A third less time: a small program cut into parts for as many threads is optimised part by part.
    "--xla_cpu_parallel_codegen_split_count=1",
    # Its preset FAST_COMPILE takes a tenth off more, but rounds so that eight devices lose the losses of one.
]
if tuple(int(n) for n in importlib.metadata.version("jaxlib").split(".")[:2]) < (0, 11):
    # A third less time than by MLIR; newer versions know no other way, and stop at a flag they do not know.
    QUICK_TO_COMPILE += ["--xla_cpu_use_fusion_emitters=false", "--xla_llvm_force_inline_before_split=false"]
if platform.machine() in ("x86_64", "AMD64"):
    # With wider vectors XLA notes hints in a program that it takes for missing features when it reads it.
    QUICK_TO_COMPILE.append("--xla_cpu_max_isa=AVX2")
