"""The pipes that one agent knows, and what it tells of them: going ones with their scheduler, ended ones as a record.

It decides nothing and does nothing; pipes.py puts in and takes out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from msgspec.structs import replace

from upipe.cluster import wire
from upipe.cluster.dealings import Command, Save, TellClient
from upipe.cluster.desk import Desk
from upipe.cluster.record import ENDED, Record
from upipe.cluster.scheduler import Scheduler
from upipe.cluster.server import refuse


@dataclass
class Entry:
    """One pipe here."""

    scheduler: Scheduler
    desk: Desk
    awaited: set[str] = field(default_factory=set)
    """Nodes that have to be met before it wakes. Empty: it is awake."""
    todo: deque[Command] = field(default_factory=deque)
    working: bool = False
    timer: asyncio.TimerHandle | None = None
    said: tuple[str, str] = ("", "")
    held: str = ""
    """Why nothing can change here, as the user was told."""
    over_since: float | None = None
    asked: float = 0.0
    """When its coordinator was last asked whether it is history."""
    stop_timer: asyncio.TimerHandle | None = None

    @property
    def record(self) -> Record:
        """The newest here."""
        return self.scheduler.record

    def close(self) -> None:
        """Timers end. Idempotent."""
        self.desk.close()
        for timer in (self.timer, self.stop_timer):
            if timer is not None:
                timer.cancel()


class KnownPipes:
    """Of one agent, by id.

    Args:
        me: node id of this agent.
    """

    def __init__(self, me: str) -> None:
        self.me = me
        self.entries: dict[str, Entry] = {}
        self.history: dict[str, Save] = {}
        """Ended pipes of which nothing is left, the oldest first; at most MOST_ENDED."""

    def entry(self, pipe: str) -> Entry:
        """One that goes on.

        Raises:
            NodeRefused: 404.
        """
        entry = self.entries.get(pipe)
        if entry is None:
            raise refuse(404, "no_such_pipe", f"This node knows no pipe {pipe}.")
        return entry

    def record(self, pipe: str) -> Record | None:
        """The newest here, of an ended pipe too; None: it is not known."""
        entry = self.entries.get(pipe)
        return entry.record if entry is not None else self.history[pipe].record if pipe in self.history else None

    def coordinated(self, entry: Entry) -> None:
        """Refuse what only its coordinator can do.

        Raises:
            NodeRefused: 409.
        """
        if not entry.scheduler.coordinates:
            other = entry.record.coordinator
            where = f"node {other} does, as far as this node knows" if other != self.me else "it is about to"
            why = f" Here {entry.held}." if entry.held else ""
            text = f"This node does not coordinate pipe {entry.record.id}; {where}.{why}"
            raise refuse(409, "not_coordinator", text)

    def successor(self, pipe: str, epoch: int) -> str:
        """Who coordinates a pipe after `epoch`, as far as the record here tells; "" when it knows of no later one."""
        record = self.record(pipe)
        return record.coordinator if record is not None and record.epoch > epoch else ""

    def contents(self) -> set[str]:
        """What the pipes that go on need of the store."""
        return {one for entry in self.entries.values() for one in entry.record.shipment.contents}

    def info(self, pipe: str) -> wire.PipeInfo:
        """How a pipe is, as far as this node knows.

        Raises:
            NodeRefused: 404.
        """
        if pipe in self.history:
            return _info(self.history[pipe].record, told_of(self.history[pipe].record), closed=True)
        entry = self.entry(pipe)
        scheduler, record = entry.scheduler, entry.record
        told = scheduler.telling() if scheduler.coordinates else told_of(record)
        if entry.held:
            told = replace(told, waiting="; ".join(filter(None, (entry.held, told.waiting))))
        return _info(record, told, closed=False)

    def infos(self) -> tuple[wire.PipeInfo, ...]:
        """All that are known, ended ones first."""
        return tuple(self.info(pipe) for pipe in (*self.history, *self.entries))


def told_of(record: Record) -> TellClient:
    """What a record alone tells: all of it when the pipe has ended."""
    return TellClient(record.state, record.reasons, "", record.books, record.crews, record.state in ENDED)


def _info(record: Record, told: TellClient, closed: bool) -> wire.PipeInfo:
    seats = record.layout.placement.seats
    return wire.PipeInfo(
        record.id, record.spec.name, record.epoch, record.coordinator, told, dict(seats), record.members, closed
    )
