"""Triton twins of the fused operators, one a file, for sm_80 and sm_90.

A file holds, in this order: the kernel; `CONFIGS`, what is checked in for each architecture, first the one that is
taken where no table says which is the fastest (`kernels/tables.py`); `CLAIMS`, the instructions that the machine code
of each kernel, by its name, must show; `supports` and `run`, which make it a `Kernel` of its operator; `examples`, the
inputs at which its machine code is checked without a GPU.
"""
