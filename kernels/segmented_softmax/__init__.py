"""Softmax of the scores between one side of a pair and H * T folded columns of text."""
