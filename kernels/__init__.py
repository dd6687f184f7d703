"""Operators that know neither data nor models: one folder an operator, `reference.py` being the mathematics on any
device.

Importing this package does nothing: it may be imported under two names (`meter_fast.kernels`, and `kernels` by
libraries that look for an optional package of that name when the working directory is the root of the tree).
"""
