"""Algebra on tensors: Gram matrices, masked least squares, fast kernels; no model, no file."""
