"""Triton kernels. `engine.ops.dispatch` imports these modules on first use: a CPU installation has no triton."""
