"""Looks at one area of this host: `python -m meter_fast.doctor.area NAME ASKED`, a JSON line for each thing that is
begun, found or known.

The PROBES of the module of that name are functions of `Asked` that yield findings, or pairs (name,
value) that others need; one that raises is itself a finding.
"""

import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any, TextIO

from meter_fast.doctor.finding import Asked, Finding, unknown


def main(argv: list[str]) -> None:
    """Look at the area argv[0] for what argv[1] asks."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, too
    asked = Asked.from_json(argv[1])
    for probe in importlib.import_module(f"meter_fast.doctor.{argv[0]}").PROBES:
        name = probe.__name__.replace("_", " ")
        say(said, {"begin": name})
        try:
            for found in probe(asked):
                say(said, {"finding": asdict(found)} if isinstance(found, Finding) else {"fact": found})
        except Exception as error:
            say(said, {"finding": asdict(unknown(name, f"{type(error).__name__}: {error}"))})
    say(said, {"end": True})


def say(stream: TextIO, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=stream, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
