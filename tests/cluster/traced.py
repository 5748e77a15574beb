"""An agent, or a program that submits, that keeps evidence: what its machines were told and answered, with the time.

    python -m tests.cluster.traced FILE node OPTIONS...         upipe-node
    python -m tests.cluster.traced FILE program SCRIPT ...      a program

Lines of all processes of a machine can be merged by their times. Only for tests: it looks into private parts.
"""

from __future__ import annotations

import logging
import runpy
import sys
import time
from typing import IO, Any

from upipe.cluster import attending, desk, part, pipes, runner
from upipe.cluster.dealings import Arrange, Heard, NodeReport, NodeUp, Reported, Save, Send, TellClient
from upipe.cluster.record import Record


class Trace:
    """Lines with times in a file that each process appends to."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 as long as the process
        self._last: dict[str, str] = {}

    def __call__(self, pipe: str, what: str) -> None:
        self._file.write(f"{stamp()} {pipe[-4:]} {what}\n")

    def once(self, key: str, pipe: str, what: str) -> None:
        """Not what was said of the same thing just before."""
        if self._last.get(key) != what:
            self._last[key] = what
            self(pipe, what)


def stamp() -> str:
    """Now, the same for all processes of the machine."""
    now = time.time()
    return time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03}"


class Stamped:
    """A stream whose lines begin with the time."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._fresh = True

    def write(self, text: str) -> int:
        """As of a file."""
        for line in text.splitlines(keepends=True):
            self._stream.write(f"{stamp()} {line}" if self._fresh else line)
            self._fresh = line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def short(one: Any) -> str:
    """An event, command, message or record in one line."""
    if isinstance(one, Heard):
        return f"Heard {short(one.message)}"
    if isinstance(one, NodeUp):
        return f"NodeUp {one.node.id}{' draining' if one.node.draining else ''}"
    if isinstance(one, Reported):
        return f"Reported {short(one.report)}"
    if isinstance(one, NodeReport):
        crews = {name: crew.workers for name, crew in one.crews.items()}
        flags = [name for name in ("present", "lost", "input_closed", "up") if getattr(one, name)]
        return f"{one.node} {one.fence} {flags} ended {one.ended} left {one.left} failed {one.failed!r} crews {crews}"
    if isinstance(one, Record):
        seats, wanted = one.layout.placement.seats, one.wanted.seats
        return (f"{one.fence} {one.state} {one.reasons} of {one.coordinator} with {one.members} before {one.before} "
                f"seats {seats} wanted {'the same' if wanted == seats else wanted} ended {one.ended} "
                f"evicted {one.evicted} ends {one.ends}")  # fmt: skip
    if isinstance(one, Save):
        return f"Save promised {one.promised} to {one.promised_to}: {short(one.record)}"
    if isinstance(one, Send):
        return f"Send {one.node} {short(one.message)}"
    if isinstance(one, Arrange):
        return f"Arrange {one.node} {one.fence} {planned(one.plan)}"
    if isinstance(one, TellClient):
        return f"Tell {one.state} {one.reasons} {one.waiting} up {one.up}"
    if hasattr(one, "record"):
        more = [getattr(one, name) for name in ("node", "candidate", "epoch", "promised") if hasattr(one, name)]
        return f"{type(one).__name__} {more} {one.record.fence} of {one.record.coordinator}"
    return repr(one)[:300]


def planned(plan: Any) -> str:
    """The workers of a node's plan."""
    if plan is None:
        return "the end"
    workers = [f"{one.processor}#{one.index}" for one in plan.workers]
    return f"{workers} leaving {plan.leaving} mirrors {[(one.id, one.epoch) for one in plan.mirrors]}"


def _wrap(owner: Any, name: str, say: Any) -> None:
    """Call `say(self, result, *arguments)` after a method."""
    method = getattr(owner, name)

    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        result = method(self, *arguments, **options)
        say(self, result, *arguments)
        return result

    setattr(owner, name, wrapped)


def trace_agent(trace: Trace) -> None:
    """What schedulers, desks and parts of this process are told and say."""

    def followed(entry: Any, event: Any) -> None:
        pipe, what = entry.record.id, short(event)
        if isinstance(event, Reported):
            trace.once(f"report {pipe} {event.report.node}", pipe, what)
        elif type(event).__name__ != "Tick":
            trace(pipe, f"{what} (awaits {entry.awaited})" if entry.awaited else what)

    follow = pipes.Pipes.follow

    def wrapped(self: Any, entry: Any, event: Any) -> None:
        followed(entry, event)
        follow(self, entry, event)

    pipes.Pipes.follow = wrapped  # type: ignore[method-assign]
    queue = pipes.Pipes._queue

    def queued(self: Any, entry: Any, commands: Any) -> None:
        found = list(commands)
        for one in found:
            trace.once(f"{type(one).__name__} {getattr(one, 'node', '')}", entry.record.id, f"  -> {short(one)}")
        queue(self, entry, found)

    pipes.Pipes._queue = queued  # type: ignore[method-assign]
    _wrap(pipes.Pipes, "_client_gone", lambda self, _, pipe: trace(pipe, "the client is gone"))
    _wrap(desk.Desk, "_arm", lambda self, _, seconds: trace.once(f"desk {self.client}", "", f"client has {seconds} s"))
    _wrap(part.Part, "order", lambda self, taken, orders: trace.once(
        f"order {self.pipe}", self.pipe,
        f"part: ordered {orders.fence} of {orders.coordinator} {planned(orders.plan)}: {taken}",
    ))  # fmt: skip
    _wrap(part.Part, "_on_news", lambda self, _, news: trace.once(
        f"news {self.pipe}", self.pipe,
        f"part: keeper {news.fence} {'present' if news.present else 'ended'} failed {news.failed!r} ended {news.ended} "
        f"left {news.left} up {news.up} {[(one.name, one.pid, one.state, one.epoch) for one in news.workers]}",
    ))  # fmt: skip
    for name in ("_on_lost", "_obeyed", "_refused", "_fail", "_leave"):
        _wrap(part.Part, name, lambda self, _, *told, name=name: trace(
            self.pipe, f"part: {name} {told[0]} lost {self.lost} gone {self._gone} orders {self.orders.fence}"
        ))  # fmt: skip


def trace_program(trace: Trace) -> None:
    """What a submitting process asks and hears."""
    _wrap(attending.Attending, "poll", lambda self, poll, *_: trace.once(
        "poll", "", f"client: asks {poll.node}, has {poll.attendance.fence}, {poll.attendance.patience} s"
    ))  # fmt: skip
    _wrap(attending.Attending, "failed", lambda self, pause, node, code, why, now: trace(
        "", f"client: {node} failed {code} {why}: {pause}"
    ))  # fmt: skip
    _wrap(attending.Attending, "answered", lambda self, found, node, news: [
        trace("", f"client: {node} says {short(one)}") for one in found
        if trace._last.update(answer=short(one)) is None and trace._last.get("said") != short(one)
        and trace._last.update(said=short(one)) is None
    ])  # fmt: skip
    _wrap(runner.ClusterRunner, "_end", lambda self, _, state, reasons: trace(self.id, f"client: {state} {reasons}"))


def main() -> None:
    """See above."""
    path, what, *arguments = sys.argv[1:]
    trace = Trace(path)
    if what == "program":
        trace_program(trace)
        sys.argv = arguments
        sys.path[0] = arguments[0].rpartition("/")[0]
        runpy.run_path(arguments[0], run_name="__main__")
        return
    trace_agent(trace)
    sys.stdout, sys.stderr = Stamped(sys.stdout), Stamped(sys.stderr)  # type: ignore[assignment]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    sys.argv = ["upipe-node", *arguments]
    from upipe.cli.node import main as node

    node()


if __name__ == "__main__":
    main()
