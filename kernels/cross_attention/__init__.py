"""Attention of the tokens of one side to the tokens of the other side."""
