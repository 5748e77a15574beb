"""Hosts on one machine: network namespaces on a bridge, with IPv4, IPv6 and multicast. Root and Debian's iproute2.

    with Lan(3) as lan:
        lan.run(0, "ping", "-c1", lan.ipv4(1))
        server = lan.popen(1, sys.executable, "-m", "http.server")
        lan.cut(1); lan.join(1)                      the cable of host 1 (both ways)
        lan.cut_one_way(0, 1); lan.join_one_way(0, 1)    packets from 0 to 1 vanish, those from 1 to 0 arrive

The bridge lives in a namespace of its own, so that nothing outside is touched, and deleting the namespaces deletes all.
After kill -9 of a test the next Lan sweeps what it left: the names carry the owner's pid and start time.

A one-way cut needs no packet filter (not every kernel has one): the sender gets a permanent neighbour entry with the
MAC of nobody, so that its packets are lost on the wire without a word, as a filter's DROP would. Multicast still
passes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PREFIX = "upipe"
NOBODY = "02:00:00:00:00:ff"
_NETNS = Path("/run/netns")
_DEADLINE = 60.0
"""Seconds that a command may take, on a busy machine."""


_RECEIVER = """
import socket, sys
address, seconds, group = sys.argv[1], float(sys.argv[2]), sys.argv[3]
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("" if group else address, 7999))
if group:
    s.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + socket.inet_aton(address))
print("bound", flush=True)
sys.stdin.readline()
s.settimeout(seconds)
print(s.recv(9))
"""


def why_not() -> str | None:
    """Why namespaces cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root; run the tests as root to have them"
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "network namespaces need the programs ip and nsenter (apt install iproute2 util-linux)"
    return None


def require() -> None:
    """Skip the test where namespaces cannot be made; in CI that is a failure: nothing of this may go untested there."""
    reason = why_not()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(f"CI runs this test, but {reason}")
    if reason is not None:
        pytest.skip(reason)


@contextlib.contextmanager
def lan_of(hosts: int, **kwargs: Any) -> Iterator[Lan]:
    """A Lan, or a skip."""
    require()
    with Lan(hosts, **kwargs) as lan:
        yield lan


class Lan:
    """Hosts on one switch. Host i has 10.77.0.(i+1)/24 and fd77::(i+1)/64 on eth0, and a loopback.

    Args:
        hosts: how many, at most 200.
        ipv6: False leaves IPv6 off.
    """

    def __init__(self, hosts: int, *, ipv6: bool = True) -> None:
        self.hosts = hosts
        self._ipv6 = ipv6
        self._stem = f"{PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        self._switch = f"{self._stem}-sw"
        self._processes: list[subprocess.Popen[Any]] = []
        sweep()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    # -------------------------------------------------------------- use

    def ipv4(self, host: int) -> str:
        """Its IPv4 address."""
        return f"10.77.0.{host + 1}"

    def ipv6(self, host: int) -> str:
        """Its IPv6 address."""
        return f"fd77::{host + 1:x}"

    def name(self, host: int) -> str:
        """Its namespace, for `ip -n`."""
        return f"{self._stem}-{host}"

    def inside(self, host: int, *command: str) -> list[str]:
        """The command line that runs `command` there. nsenter replaces itself, so the pid is the command's; unlike
        `ip netns exec` it leaves /sys alone, where cgroups are."""
        return ["nsenter", f"--net={_NETNS / self.name(host)}", "--", *command]

    def run(self, host: int, *command: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end; its output is captured as text."""
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": _DEADLINE, "check": True}
        return subprocess.run(self.inside(host, *command), **{**options, **kwargs})

    def popen(self, host: int, *command: str, **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a command there; what still runs at the end is killed."""
        process = subprocess.Popen(self.inside(host, *command), **kwargs)
        self._processes.append(process)
        return process

    def receives(self, host: int, address: str, send: Callable[[], object], seconds: float, group: str = "") -> bool:
        """Whether a datagram to port 7999 of a host arrives there, at most `seconds` after send() returned.

        Args:
            address: of the host.
            send: sends it, and ends: the time for which is waited begins only then, however slow this machine is.
            group: a multicast group that the receiver joins with the address.
        """
        receiver = self.popen(
            host, sys.executable, "-c", _RECEIVER, address, str(seconds), group, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert receiver.stdout is not None and receiver.stdout.readline() == "bound\n"
        send()
        return receiver.communicate("sent\n", timeout=seconds + _DEADLINE)[0] != ""

    def processes(self, host: int) -> list[int]:
        """Pids of all that run there, in their order. Zombies are in no namespace."""
        return _inside(self.name(host))

    def cut(self, host: int) -> None:
        """Pull its cable, at the switch: the host keeps its addresses and sees no carrier."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def join(self, host: int) -> None:
        """Plug it in again."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def cut_one_way(self, source: int, target: int) -> None:
        """Packets from source to target vanish; the other way they arrive."""
        for address in self._addresses(target):
            _ip(
                "-n",
                self.name(source),
                "neigh",
                "replace",
                address,
                "lladdr",
                NOBODY,
                "nud",
                "permanent",
                "dev",
                "eth0",
            )

    def join_one_way(self, source: int, target: int) -> None:
        """End cut_one_way."""
        for address in self._addresses(target):
            _ip("-n", self.name(source), "neigh", "del", address, "dev", "eth0", check=False)

    def multicast(self, host: int, on: bool) -> None:
        """Whether the interface of a host does multicast."""
        _ip("-n", self.name(host), "link", "set", "eth0", "multicast", "on" if on else "off")

    def multicast_passes(self, host: int, on: bool) -> None:
        """Whether the switch passes multicast on to a host, as some networks do not."""
        _bridge(self._switch, "link", "set", "dev", f"port{host}", "mcast_flood", "on" if on else "off")

    def close(self) -> None:
        """End every process in it, remove everything. Idempotent."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(_DEADLINE)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._processes.clear()
        for name in [self.name(host) for host in range(self.hosts)] + [self._switch]:
            _remove(name)

    def __enter__(self) -> Lan:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -------------------------------------------------------------- making it

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            self._plug(host)

    def _plug(self, host: int) -> None:
        name, port = self.name(host), f"port{host}"
        _ip("netns", "add", name)
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        self.run(host, "sh", "-c", f"echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad; "
                 f"echo {0 if self._ipv6 else 1} > /proc/sys/net/ipv6/conf/all/disable_ipv6")  # fmt: skip
        _ip("-n", name, "addr", "add", f"{self.ipv4(host)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        if self._ipv6:
            _ip("-n", name, "addr", "add", f"{self.ipv6(host)}/64", "dev", "eth0", "nodad")
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")

    def _addresses(self, host: int) -> list[str]:
        told = json.loads(_ip("-n", self.name(host), "-j", "addr", "show", "dev", "eth0"))
        return [one["local"] for one in told[0]["addr_info"]]


def sweep() -> None:
    """Remove the namespaces of owners that are dead."""
    for path in _NETNS.glob(f"{PREFIX}-*"):
        found = re.fullmatch(rf"{PREFIX}-(\d+)-(\d+)-.+", path.name)
        if found and _start_time(int(found[1])) != int(found[2]):
            _remove(path.name)


def _remove(name: str) -> None:
    """Kill what runs in one of our namespaces, and remove it."""
    if not (_NETNS / name).exists():
        return
    for pid in _inside(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _ip("netns", "del", name, check=False)


def _inside(name: str) -> list[int]:
    """What `ip netns pids` tells, without a process for each look: tests ask often."""
    try:
        wanted = os.stat(_NETNS / name)
    except FileNotFoundError:
        return []
    found = []
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        with contextlib.suppress(OSError):  # it ended
            of = os.stat(f"/proc/{pid}/ns/net")
            if (of.st_dev, of.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(pid)
    return found


def _ip(*arguments: str, check: bool = True) -> str:
    return _tool("ip", *arguments, check=check)


def _bridge(switch: str, *arguments: str) -> str:
    return _tool("bridge", "-n", switch, *arguments, check=True)


def _tool(*command: str, check: bool) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _start_time(pid: int) -> int:
    """Clock ticks after boot, -1 when there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


_numbers = _count()
