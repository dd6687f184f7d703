"""How other processes find this host: its name, its interfaces, the port of the main process."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil

from meter_fast.doctor.finding import Asked, Finding, fine, unknown
from meter_fast.training.ports import free_port

SECONDS = 10
LOOPBACK = "127."


def host_name(asked: Asked) -> Iterator[Finding]:
    """What the host's own name resolves to: gloo tells others that address unless an interface is named."""
    name = socket.gethostname()
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    try:
        found = sorted({entry[4][0] for entry in socket.getaddrinfo(name, None, socket.AF_INET)})
    except socket.gaierror as error:
        text = f"{name} does not resolve: {error.strerror}"
        level = "fails" if asked.hosts > 1 and not chosen else "remark"
        yield Finding("host name", level, text, f"a line with {name} and its address in /etc/hosts, or "
                      "GLOO_SOCKET_IFNAME=INTERFACE")  # fmt: skip
        return
    yield resolved(name, found, asked.hosts, chosen)


def resolved(name: str, addresses: list[str], hosts: int, chosen: str | None) -> Finding:
    """addresses: of the host's name; hosts: in the run; chosen: GLOO_SOCKET_IFNAME."""
    text = f"{name} resolves to {', '.join(addresses)}"
    if chosen:
        return fine("host name", f"{text}; gloo uses GLOO_SOCKET_IFNAME={chosen}")
    if not all(one.startswith(LOOPBACK) for one in addresses):
        return fine("host name", text)
    if hosts <= 1:
        return fine("host name", f"{text}: enough for one host")
    return Finding("host name", "fails", f"{text}: gloo would tell that to other hosts, which then reach themselves",
                   "GLOO_SOCKET_IFNAME=INTERFACE as a line of .deepspeed_env, or the address of its network for "
                   f"{name} in /etc/hosts")  # fmt: skip


def interfaces(asked: Asked) -> Iterator[Finding]:
    """Those that are up, and which NCCL and gloo are told to use."""
    states, addresses = psutil.net_if_stats(), psutil.net_if_addrs()
    up = {
        name: [one.address for one in addresses.get(name, ()) if one.family == socket.AF_INET]
        for name, state in states.items()
        if state.isup
    }
    shown = ", ".join(f"{name} {' '.join(found) or 'without IPv4'}" for name, found in sorted(up.items()))
    yield fine("interfaces", shown or "none is up")
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if variable in os.environ:
            yield named(variable, os.environ[variable], sorted(up))
    others = sorted(name for name, found in up.items() if found and not found[0].startswith(LOOPBACK))
    if asked.hosts > 1 and not others:
        yield Finding("network", "fails", "no interface but the loopback is up", "connect this host to the others")


def named(variable: str, value: str, up: list[str]) -> Finding:
    """Whether an interface that `variable` names is up. NCCL reads a list of beginnings, "=" before exact names, "^"
    before those to leave out; gloo reads a list of exact names."""
    words = [word for word in value.lstrip("^=").split(",") if word]
    exact = variable.startswith("GLOO") or "=" in value[:2]

    def matches(name: str) -> bool:
        return any(name == word if exact else name.startswith(word) for word in words)

    chosen = [name for name in up if matches(name) != value.startswith("^")]
    if not chosen:
        return Finding(variable, "fails", f"{value}: no such interface is up", f"name one of {', '.join(up)}")
    if variable.startswith("GLOO") and (missing := [word for word in words if word not in up]):
        return Finding(variable, "fails", f"{value}: {', '.join(missing)} is not up", f"name some of {', '.join(up)}")
    return fine(variable, f"{value}: {', '.join(chosen)}")


def port(asked: Asked) -> Iterator[Finding]:
    """Whether the main process can listen on its port."""
    if not asked.first:
        return
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", asked.port))
        except OSError as error:
            holder = _holder(asked.port)
            yield Finding("master port", "fails", f"{asked.port}: {error.strerror}{holder}", "--master_port N of "
                          f"deepspeed with a free one, {free_port()} for example, or end what holds it")  # fmt: skip
        else:
            yield fine("master port", f"{asked.port} is free")


def _holder(number: int) -> str:
    try:
        found = [one for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == number]
    except (psutil.Error, OSError):
        return ""
    return f", held by process {found[0].pid}" if found and found[0].pid else ""


def address(asked: Asked) -> Iterator[Finding | tuple[str, Any]]:
    """Where the others would be told to find the main process, as DeepSpeed finds it out: hostname -I."""
    if not asked.hosts or not asked.first:
        return
    if not shutil.which("hostname"):
        yield unknown("master address", "there is no command hostname here: --master_addr of deepspeed is needed")
        return
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=SECONDS)
    found = done.stdout.split()
    if done.returncode or not found:
        yield Finding("master address", "fails", f"hostname -I gives none ({done.stderr.strip() or 'nothing said'})",
                      "--master_addr ADDRESS of deepspeed")  # fmt: skip
        return
    yield "address", found[0]
    yield fine("master address", f"{found[0]}, the first of hostname -I")


PROBES = (host_name, interfaces, port)
