"""Bias and exact GELU, with the gradient of the bias in the same pass as the gradient of the input."""
