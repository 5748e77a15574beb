"""What a scheduler said and that could not be done yet, because the disk takes no record: bounded. Pure.

Of each kind only the newest counts: a record is the whole state, orders and what the client is told are whole too, and
messages are said again by whoever waits for them (scheduler.RESEND). So nothing is lost by forgetting the older ones.
"""

from __future__ import annotations

from collections.abc import Iterable

from upipe.cluster.dealings import Arrange, Command, Save, Send

MOST = 256
"""Commands of one pipe that wait: many seconds of a full disk."""


def shortened(waiting: Iterable[Command]) -> list[Command]:
    """The newest of each kind and node, in their order, but the record first: everything after it rests on it."""
    newest: dict[tuple[str, ...], Command] = {}
    for command in waiting:
        key = _kind(command)
        newest.pop(key, None)
        newest[key] = command
    found = list(newest.values())
    return [one for one in found if isinstance(one, Save)] + [one for one in found if not isinstance(one, Save)]


def _kind(command: Command) -> tuple[str, ...]:
    if isinstance(command, Send):
        return ("send", command.node, type(command.message).__name__)
    return (type(command).__name__, command.node if isinstance(command, Arrange) else "")
