"""Kernels in Triton. Nothing here is imported unless an operator asks for it: a CPU install has no triton."""
