"""Kernels that no kept library has, one folder each; none yet."""
