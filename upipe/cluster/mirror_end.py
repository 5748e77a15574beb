"""What both ends of a mirror have in common (mirror.py): handle, links, doing what was decided, being in trouble.

What the queue cannot do now (a lock is held by a stopped process, no descriptor is left) troubles this mirror only: it
leaves its link, says so, and greets anew after AGAIN seconds or on the next link.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from upipe.cluster.link import Link
from upipe.cluster.mirror_state import (
    Command,
    Failed,
    SayEnd,
    SayHello,
    SayRefusal,
    SayResume,
    Sink,
    Source,
)
from upipe.cluster.records import SOURCE, End, Hello, Record, Refusal, Resume, mirror_key
from upipe.errors import MirrorRefused, UpipeError
from upipe.memq.queue import MemQ

AGAIN = 1.0
"""Seconds until a mirror in trouble greets again."""
PATIENCE = 0.05
"""Seconds that a mirror waits for a lock of its queue, and the whole agent with it: who holds one does so for some
microseconds, unless it was stopped. Longer keeps the agent from answering others, who take it for dead then."""

log = logging.getLogger("upipe.cluster")
F = TypeVar("F", bound=Callable[..., Any])


def ignore(*_: object) -> None:
    pass


def safe(otherwise: Any) -> Callable[[F], F]:
    """Of what a link or the event loop calls: a failure is this mirror's trouble, and theirs is `otherwise`."""

    def wrap(method: F) -> F:
        @functools.wraps(method)
        def call(self: MirrorEnd, *args: Any) -> Any:
            try:
                return method(self, *args)
            except Exception as error:
                self.troubled(error)
                return otherwise

        return cast(F, call)

    return wrap


class MirrorEnd:
    """What both ends have in common: the handle, the bell, doing what was decided."""

    machine: Source | Sink
    role = 0

    def __init__(self, ring: MemQ, name: str) -> None:
        self.name = name
        self.key = mirror_key(name)
        self.ring = ring
        ring.patience = PATIENCE
        self.on_failed: Callable[[Failed], None] = ignore
        """Called once when this end cannot go on (its epoch is too old, the other copy is another queue's)."""
        self.on_news: Callable[[], None] = ignore
        """Called when it stands elsewhere than before, for those who show it; often while frames flow."""
        self.trouble = ""
        """Why it does not go on now, although it may; "" when it does."""
        self._logged = ("", 0.0)
        """The trouble that was logged last, and when it was seen last."""
        self._again: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._links: dict[int, Link] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def state(self) -> str:
        """"open", "cut" (no link carries it now), "ended" or "failed", with the reason."""
        if self.machine.failure is not None:
            return f"failed: {self.machine.failure.text}"
        if self.trouble:
            return f"failed, tries again: {self.trouble}"
        if self.is_over:
            return "ended"
        return "open" if self.machine.link is not None else "cut"

    @property
    def is_over(self) -> bool:
        """The stream ended, and all of it is finished."""
        raise NotImplementedError

    @safe(None)
    def connected(self, link: Link) -> None:
        self._links[link.number] = link
        self._do(self.machine.connected(link.number))

    @safe(None)
    def disconnected(self, link: Link) -> None:
        self._links.pop(link.number, None)
        self._do(self.machine.disconnected(link.number))
        self.on_news()

    def troubled(self, error: Exception) -> None:
        """Something failed that shall not: leave the links, tell, and greet again after AGAIN seconds."""
        text, now = f"{type(error).__name__}: {error}", self._loop.time()
        same = text == self._logged[0] and now - self._logged[1] <= 3 * AGAIN  # at each try
        if not same and not self.ring.is_closed:
            log.error("mirror %s: %s", self.name, text, exc_info=None if isinstance(error, UpipeError) else error)
        self.trouble, self._logged = text, (text, now)
        links = list(self._links.values())
        self._links.clear()  # first: what follows must not fail again
        for link in links:
            link.remove(self)  # type: ignore[arg-type]
        if self._again is None and not self.ring.is_closed:
            self._again = self._loop.call_later(AGAIN, self._greet_again, links)
        self.on_news()

    @safe(None)
    def _greet_again(self, links: list[Link]) -> None:
        self._again, self.trouble = None, ""
        self._begin_again()
        for link in links:
            if not link.closed.done() and link.number not in self._links:
                link.add(self)  # type: ignore[arg-type]

    def _begin_again(self) -> None:
        """After trouble."""

    def close(self) -> None:
        """Leave the links and the queue, which stays as it is: another mirror can go on by position. Idempotent."""
        if self.ring.is_closed:
            return
        for link in list(self._links.values()):
            link.remove(self)  # type: ignore[arg-type]
        for timer in (self._timer, self._again):
            if timer is not None:
                timer.cancel()
        self._sleep_no_more()
        self.ring.close()

    def _sleep_no_more(self) -> None:
        raise NotImplementedError

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            try:
                self._one(command)
            except MirrorRefused as refused:
                self._do(self.machine.broke(refused.code, refused.message))
                return

    def _one(self, command: Command) -> None:
        match command:
            case SayHello(link):
                self._say(link, self._hello())
            case SayRefusal(link, code, text, epoch):
                self._say(link, Refusal(self.key, code, text, epoch))
            case SayEnd(link, position):
                self._say(link, End(self.key, position))
            case SayResume(link, position):
                self._say(link, Resume(self.key, position))
            case Failed():
                log.error("mirror %s stops (%s): %s", self.name, command.code, command.text)
                self.on_failed(command)
                self.on_news()

    def _say(self, number: int, record: Record) -> None:
        link = self._links.get(number)
        if link is not None:
            link.say(record)

    def _hello(self) -> Hello:
        tail = self.ring.settled()[0] if self.role == SOURCE else 0
        books = self.machine.allowed if isinstance(self.machine, Sink) else (tail, 0, 0)
        machine = self.machine
        return Hello(
            self.key,
            self.ring.head,
            self.role,
            machine.epoch,
            machine.capacity,
            *books,
            machine.fingerprint,
            self.name,
            isinstance(machine, Sink) and machine.ended,
        )
