"""Kernels that no kept library has, one folder each. See docs/kernels.md.

A folder has `reference.py`, `gpu.py`, `tpu.py`, `shapes.py`, and in `__init__.py` one public function with
the folder's name and its `OP`. Nothing but jax, NumPy and the standard library is imported here.
"""

KERNELS = ("decode_attention", "sigmoid_attention")
