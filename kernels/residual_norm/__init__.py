"""Bias, dropout, residual sum and LayerNorm in one pass."""
