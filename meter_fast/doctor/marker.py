"""Keeps a file in a folder for as long as its standard input is open: `python -m meter_fast.doctor.marker RUN_DIR`.

Other hosts look for it, to find out whether the folder is the same one there.
"""

import sys
import tempfile

from meter_fast.doctor.disks import existing

SECONDS = 5  # to remove it


def main(argv: list[str]) -> None:
    """Print the file's path and wait."""
    with tempfile.NamedTemporaryFile(prefix=".meter-fast-doctor-", dir=existing(argv[0])) as file:
        print(file.name, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
