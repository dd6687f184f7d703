"""Asks the hosts of a hostfile over ssh, all at once, as pdsh would reach them, and compares what they say.

Knows ssh, the order of questions and what must be the same everywhere. A host that does not answer is a finding.
"""

import asyncio
import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from meter_fast.doctor import gloo
from meter_fast.doctor.bounded import ask
from meter_fast.doctor.clocks import NoAnswer, compare
from meter_fast.doctor.finding import Asked, Finding, Report, fine, unknown

SKEW_FAILS, SKEW_REMARK = 30.0, 1.0  # seconds
AT_ONCE = 32
REMEDIES = {
    "permission denied": "ssh-copy-id {host}: the key of this user must be allowed there without a password",
    "host key verification failed": "ssh-keyscan -H {host} >> ~/.ssh/known_hosts",
    "could not resolve": "the name in the hostfile, /etc/hosts or ~/.ssh/config",
    "connection refused": "start sshd on {host} (apt install openssh-server)",
    "timed out": "the network, the firewall, and whether {host} is up",
    "no route to host": "the network, the firewall, and whether {host} is up",
    "no answer within": "the network, the firewall, and whether {host} is up",
}


@dataclass(frozen=True)
class Cluster:
    """reports: of the hosts that answered. reached: what was found about reaching each. between: what concerns them
    together."""

    reports: dict[str, Report] = field(default_factory=dict)
    reached: dict[str, list[Finding]] = field(default_factory=dict)
    between: list[Finding] = field(default_factory=list)


def ssh(host: str, seconds: float) -> list[str]:
    """The command that runs one shell line on a host, and never asks for anything."""
    wait = max(1, int(min(10, seconds)))
    more = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))  # what pdsh adds
    return ["ssh", *more, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={wait}", host]


def line_for(words: list[str], environment: Mapping[str, str]) -> str:
    """The shell line that runs a command as DeepSpeed's launcher does: its variables, its folder, its Python."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join(["cd", shlex.quote(os.getcwd()), "&&", "exec", "env", *variables, *map(shlex.quote, words)])


async def look(hosts: Mapping[str, int], asked: Asked, environment: Mapping[str, str]) -> Cluster:
    """Ask every host; then let one process on each meet the others. hosts: slots by name."""
    gate, cluster = asyncio.Semaphore(AT_ONCE), Cluster()
    asked = replace(asked, world=sum(hosts.values()), hosts=len(hosts))

    async def one(host: str, number: int) -> None:
        async with gate:
            here = replace(asked, slots=hosts[host], first=number == 0)
            report = await _report(host, here, environment, cluster.reached.setdefault(host, []))
            if report is not None:
                cluster.reports[host] = report

    await asyncio.gather(*(one(host, number) for number, host in enumerate(hosts)))
    in_order = {host: cluster.reports[host] for host in hosts if host in cluster.reports}
    cluster = replace(cluster, reports=in_order, between=differences(in_order))
    if len(hosts) > 1 and "gloo" in asked.areas:
        cluster.between.append(await _meet(list(hosts), cluster, asked, environment))
    return cluster


async def _report(host: str, asked: Asked, environment: Mapping[str, str], reached: list[Finding]) -> Report | None:
    """What a host says of itself; None where it does not, with the cause in `reached`."""
    command = ssh(host, asked.seconds)
    try:
        clock = await compare(command, asked.seconds)
    except (NoAnswer, OSError) as error:
        text = str(error)
        remedy = next((r for words, r in REMEDIES.items() if words in text.lower()), "try: ssh {host} hostname")
        reached.append(Finding("ssh", "fails", text, remedy.format(host=host)))
        return None
    reached.append(fine("ssh", "without a password"))
    reached.append(clock_finding(clock.skew, clock.high - clock.low))
    words = [sys.executable, "-m", "meter_fast.doctor.local", "--json", "-", asked.to_json()]
    seconds = 8 * asked.seconds + 30  # areas one after the other, in the worst case
    answer = await ask([*command, line_for(words, environment)], seconds)
    if answer.code == 0:
        try:
            return Report.from_dict(json.loads(answer.out.strip().splitlines()[-1]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reached.append(Finding("doctor", "fails", f"its report cannot be read ({error!r})", "the same meter_fast "
                                   "on all hosts, and login scripts that print nothing"))  # fmt: skip
            return None
    text = answer.last_line or f"exit code {answer.code}"
    if answer.code is None:
        text = f"no report within {seconds:g} s"
    reached.append(Finding("doctor", "fails", text, f"{sys.executable} with meter_fast, and the folder {os.getcwd()}, "
                           "must be there under the same path on every host"))  # fmt: skip
    return None


def clock_finding(skew: float, span: float) -> Finding:
    """skew: seconds ahead of this machine; span: how exactly that is known."""
    text = f"{abs(skew):.3g} s {'ahead' if skew > 0 else 'behind'}" if skew else f"agrees within {span:.2g} s"
    remedy = "let chrony or systemd-timesyncd set the clock"
    if abs(skew) >= SKEW_FAILS:
        return Finding("clock", "fails", text, remedy)
    if abs(skew) >= SKEW_REMARK:
        return Finding("clock", "remark", text, remedy)
    return fine("clock", text)


def differences(reports: Mapping[str, Report]) -> list[Finding]:
    """What should be the same on all hosts and is not."""
    values: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    counts: dict[tuple[str, str], str] = {}
    for host, report in reports.items():
        for area, found in report.areas.items():
            for one in found:
                if one.across:
                    values[area, one.name][host] = one.value
                    counts[area, one.name] = one.across
    differ = []
    for (area, name), by_host in values.items():
        said = {host: by_host.get(host, "nothing") for host in reports}
        if len(set(said.values())) > 1:
            hosts_by_value = defaultdict(list)
            for host, value in said.items():
                hosts_by_value[value].append(host)
            text = "; ".join(f"{', '.join(found)}: {value}" for value, found in hosts_by_value.items())
            differ.append(Finding(f"{area}: {name}", counts[area, name], text, "make it the same on all hosts"))
    if not differ and len(reports) > 1:
        differ.append(fine("versions, devices, data", f"the same on {len(reports)} hosts"))
    return differ


async def _meet(hosts: list[str], cluster: Cluster, asked: Asked, environment: Mapping[str, str]) -> Finding:
    """One process on each host, over gloo, with the main one where DeepSpeed would have it."""
    silent = [host for host in hosts if host not in cluster.reports]
    if silent:
        return unknown("gloo", f"not tried: {', '.join(silent)} did not answer")
    address = cluster.reports[hosts[0]].facts.get("address")
    if not address:
        return unknown("gloo", f"not tried: {hosts[0]} does not tell its address")

    async def one(rank: int, host: str):
        words = gloo.command(rank, len(hosts), str(address), asked.port, asked.seconds / 2)
        return await ask([*ssh(host, asked.seconds), line_for(words, environment)], asked.seconds)

    answers = await asyncio.gather(*(one(rank, host) for rank, host in enumerate(hosts)))
    failed = {host: answer for host, answer in zip(hosts, answers) if answer.code != 0}
    if not failed:
        return fine("gloo", f"a process on each of {len(hosts)} hosts met at {address}:{asked.port}")
    host, answer = next(iter(failed.items()))
    said = gloo.why(answer.err) if answer.code is not None else f"no answer within {asked.seconds:g} s"
    return Finding("gloo", "fails", f"processes on the hosts do not meet at {address}:{asked.port}: {host}: {said}",
                   gloo.REMEDY)  # fmt: skip
