"""Reads a hostfile by DeepSpeed's own reader: `python -m meter_fast.doctor.hostfile FILE`."""

import json
import logging
import sys
from pathlib import Path


def read(path: Path) -> dict[str, int]:
    """Slots of each host, in order. Raises ValueError with the line that is wrong, OSError where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        return dict(fetch_hostfile(str(path)))
    except ValueError as error:
        number = wrong_line(lines, str(error))
        where = f"{path}, line {number}: {lines[number - 1].strip()!r}" if number else f"{path}"
        raise ValueError(f"{where}: {error}; a host is a line NAME slots=N, each once") from None


def wrong_line(lines: list[str], error: str) -> int:
    """Which line (from 1) the error is about: the one that it quotes, or the last that begins with a host it names; 0
    for none."""
    found = 0
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if f"bad entry: {text}," in error:
            return number
        if f"entries for {text.split()[0]}," in error:
            found = number
    return found


def main(argv: list[str]) -> int:
    """Print the hosts as JSON, or the error with exit code 2."""
    logging.disable(logging.ERROR)  # DeepSpeed logs what it raises
    try:
        hosts = read(Path(argv[0]))
    except (ValueError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 2
    print(json.dumps({"hosts": hosts}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
