"""Objectives: the only code that knows both a batch and a model. One file an objective, and one that runs several at
once."""
