"""Imported by every Python process that has this folder on PYTHONPATH; see faults.py."""

import os
import sys

import faults

if faults.VARIABLE in os.environ:
    try:
        faults.parse(os.environ[faults.VARIABLE])
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2)
    faults.install_with_the_trainer()
