"""Triton kernels for NVIDIA GPUs, one file per operation, of the same name as its meaning one level up.

Importing a module of this package imports triton; nothing outside it does. So the modules above import these inside the
function that dispatches, and only for a tensor on a CUDA device. Every launcher here takes tensors of any device, so
that the same code runs in Triton's interpreter (`TRITON_INTERPRET=1`) on tensors of a CPU.
"""
