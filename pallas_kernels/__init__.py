"""Kernels that no kept library has, one folder each. See docs/kernels.md.

A folder has `reference.py`, `tpu.py`, `gpu.py` where there is such a kernel, `shapes.py`, and in
`__init__.py` one public function with the folder's name and its `OP`. Nothing but jax, NumPy and the standard
library is imported here.
"""

KERNELS = (
    "binary_coded_matmul",
    "block_sparse_attention",
    "block_sparse_matmul",
    "decode_attention",
    "depthwise_conv",
    "neighborhood_attention",
    "quantized_matmul",
    "selective_scan",
    "sigmoid_attention",
    "sparse_ffn",
)
