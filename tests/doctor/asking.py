"""What the tests of the doctor ask, and programs that stand in for others on PATH. Helpers only, no tests."""

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path

from meter_fast.doctor.finding import Asked, Finding
from meter_fast.doctor.local import look

SSH = """#!/bin/sh
# ssh that carries the command out here, in another folder and with another login shell than where it is asked.
while :; do case "$1" in -o|-F) shift 2;; *) break;; esac; done
host=$1; shift; cd /
case "$host" in
  denied) echo 'denied: Permission denied (publickey).' >&2; exit 255;;
  unknown) echo 'Host key verification failed.' >&2; exit 255;;
  hanging) exec sleep 1000;;
  talking) echo 'Welcome!';;
  slow) sleep 1;;
  ahead) PATH=$STAND_IN/ahead:$PATH;;
  dead) case "$*" in *doctor*) kill -9 $$;; esac;;
  mute) case "$*" in *doctor*) echo Welcome; exit 0;; esac;;
  older) set -- "export PYTHONPATH=$STAND_IN/older; $*";;
esac
exec /bin/sh -c "$*"
"""


def asked(tmp_path: Path, *settings: str, **changes) -> Asked:
    """A small run."""
    command = ("pretrain", "size=tiny", *settings)
    return replace(Asked(command, "", str(tmp_path / "run"), 1, 100.0), **changes)


def answers(ask: Asked, area: str) -> dict[str, Finding]:
    """The findings of one area by name, from processes as in earnest."""
    return {one.name: one for one in asyncio.run(look(replace(ask, areas=(area,)))).areas[area]}


def program(folder: Path, name: str, text: str) -> Path:
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def distribution(folder: Path, name: str, version: str) -> None:
    """What tells Python that a distribution is installed."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def stand_ins(folder: Path) -> dict[str, str]:
    """The environment in which hosts are asked through stand-ins for ssh and pdsh."""
    program(folder / "bin", "ssh", SSH)
    program(folder / "bin", "pdsh", "#!/bin/sh\nexit 0\n")
    program(folder / "ahead", "date", "#!/bin/sh\necho $(($(/bin/date +%s) + 100)).0\n")
    distribution(folder / "older", "torch", "2.1.0")
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "STAND_IN": str(folder)}


def found(probe, ask) -> dict[str, Finding]:
    """The findings of one probe by name."""
    return {one.name: one for one in probe(ask) if isinstance(one, Finding)}
