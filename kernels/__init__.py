"""Fused operators, one a file: schema, shape rule, reference, kernels and cost."""
