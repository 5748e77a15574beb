"""What a pipe and a worker may go through: two literal tables, and the small machine that runs them.

A table reads ``state -> event -> next state``. An event that a state does not list is illegal: firing it raises
`IllegalTransition`, which carries the history, and changes nothing. The documentation is rendered from the same
tables by `markdown`, so that it cannot drift.

Three habits of the tables:

* ``drain`` and ``stop`` are what users call in a ``finally``: they are legal in every state they can meet there and,
  once a pipe has ended, leave it as it is (a completed pipe that is stopped stays completed).
* What two processes may report in either order is legal in both: ``up`` while draining, the death of a worker that has
  already failed or that we killed ourselves.
* There is no way back to the start: a pipe runs once. Declaring it again is cheap, and a report never mixes two runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from upipe.errors import IllegalTransition

Table = Mapping[str, Mapping[str, str]]
"""State -> event -> next state. Every state is a key; one without events is a dead end."""

PIPE: Final[Table] = {
    "declared": {"start": "starting", "stop": "stopped"},
    "starting": {
        "up": "running",
        "drain": "draining",
        "complete": "completed",  # scripts that end before they ever report themselves ready
        "fail": "failed",
        "stop": "stopped",
    },
    "running": {"drain": "draining", "complete": "completed", "fail": "failed", "stop": "stopped"},
    "draining": {
        "up": "draining",  # terminate() overtook the last worker's report
        "drain": "draining",
        "complete": "completed",
        "fail": "failed",
        "stop": "stopped",
    },
    "completed": {"drain": "completed", "stop": "completed"},
    "failed": {"drain": "failed", "fail": "failed", "stop": "failed"},  # processors may fail side by side
    "stopped": {"drain": "stopped", "stop": "stopped"},
}
"""A pipe. ``up``: every worker has reported ready; ``drain``: terminate(); ``complete``: every worker has exited and
the books are closed; ``fail``: the pipe gives up; ``stop``: now."""

PIPE_ENDED: Final = frozenset({"completed", "failed", "stopped"})
"""The states a pipe never leaves."""

WORKER: Final[Table] = {
    "spawning": {
        "ready": "running",
        "drain": "draining",
        "exit": "exited",  # a script that never connects
        "die": "lost",
        "fail": "failed",
        "stop": "stopped",
    },
    "running": {"drain": "draining", "exit": "exited", "die": "lost", "fail": "failed", "stop": "stopped"},
    "draining": {
        "ready": "draining",  # drained before it was up
        "drain": "draining",
        "exit": "exited",
        "die": "lost",
        "fail": "failed",
        "stop": "stopped",
    },
    "lost": {
        "spawn": "spawning",
        "drain": "exited",  # the dead hold nothing: their frames are already back in the queue
        "fail": "failed",
        "stop": "stopped",
    },
    "exited": {"drain": "exited", "stop": "exited"},
    "failed": {"drain": "failed", "exit": "failed", "die": "failed", "stop": "failed"},
    "stopped": {"drain": "stopped", "exit": "stopped", "die": "stopped", "stop": "stopped"},
}
"""One worker slot, over all its lives until it ends. ``ready``: it connected; ``drain``: take nothing new, finish, end;
``exit``: its process ended well; ``die``: its process ended otherwise; ``spawn``: its restart begins; ``fail``: no
further restart; ``stop``: now. A slot that autoscaling brings back starts with a new machine."""

WORKER_ENDED: Final = frozenset({"exited", "failed", "stopped"})
"""The states a worker slot never leaves."""

STORY_LENGTH: Final = 32
"""Transitions a machine remembers. More tells more in an error and costs memory per worker."""


class Machine:
    """The state of one thing that follows a table.

    Args:
        table: the transitions.
        initial: the state to begin in; ValueError when the table does not have it.
        name: what errors call this machine, such as ``pipe 'plus-one'``.
    """

    __slots__ = ("_name", "_state", "_story", "_table")

    def __init__(self, table: Table, initial: str, name: str = "machine") -> None:
        if initial not in table:
            raise ValueError(f"{name}: {initial!r} is no state; the table has {', '.join(table)}")
        self._table = table
        self._state = initial
        self._name = name
        self._story: deque[tuple[str, str]] = deque(maxlen=STORY_LENGTH)

    @property
    def state(self) -> str:
        """The present state."""
        return self._state

    @property
    def story(self) -> tuple[tuple[str, str], ...]:
        """The last STORY_LENGTH transitions as (state, event fired in it), oldest first; direct repeats count once."""
        return tuple(self._story)

    def can(self, event: str) -> bool:
        """Whether `event` is legal now."""
        return event in self._table[self._state]

    def fire(self, event: str) -> str:
        """Follow `event` and return the state it leads to; IllegalTransition, and no change, when it is not legal."""
        after = self._table[self._state].get(event)
        if after is None:
            raise IllegalTransition(self._refusal(event), self.story)
        entry = (self._state, event)
        if not self._story or self._story[-1] != entry:  # a thousand idempotent stops must not push out the story
            self._story.append(entry)
        self._state = after
        return after

    def _refusal(self, event: str) -> str:
        legal = ", ".join(self._table[self._state]) or "nothing"
        return f"{self._name} is {self._state}, where {event!r} is not possible (possible now: {legal})"

    def __repr__(self) -> str:
        return f"<{self._name}: {self._state}>"


def events(table: Table) -> tuple[str, ...]:
    """Every event of `table`, in the order of first mention."""
    return tuple(dict.fromkeys(event for moves in table.values() for event in moves))


def markdown(table: Table) -> str:
    """Render `table` for the documentation: a row per state, a column per event, ``-`` where the event is illegal."""
    columns = events(table)
    lines = [_row(("state", *columns)), _row(("---",) * (len(columns) + 1))]
    lines += [_row((f"**{state}**", *(moves.get(event, "-") for event in columns))) for state, moves in table.items()]
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
