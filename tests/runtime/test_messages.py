"""Control messages: one door, bounded at the sender, whatever users write into their exceptions."""

from __future__ import annotations

import socket

import pytest

from upipe.errors import PipeError
from upipe.runtime import messages
from upipe.runtime.messages import Buried, Done, Drain, Exited, Paused, Raised, Ready, Refused, Spawn, Spawned


@pytest.mark.parametrize("message", [Ready(), Done(), Buried(7), Raised("run", "ValueError", "no", "stack", True)])
def test_from_worker(message: messages.FromWorker) -> None:
    assert messages.decode_from_worker(messages.encode(message)) == message


@pytest.mark.parametrize(
    "message", [Spawned("a#0", 1, 2), Refused("a#0", "no"), Exited("a#0", 1, -9, 0.5), Paused("a#0", 1, True)]
)
def test_from_server(message: messages.FromServer) -> None:
    assert messages.decode_from_server(messages.encode(message)) == message


def test_to_server_and_worker() -> None:
    spawn = Spawn("a#0", ("python", "x.py"), {"A": "B"})
    assert messages.decode_to_server(messages.encode(spawn)) == spawn
    assert messages.decode_to_worker(messages.encode(Drain())) == Drain()


def test_long_texts_keep_their_beginning_and_their_end() -> None:
    told = "first line " + "é" * 10_000_000 + " last line"
    found = messages.decode_from_worker(messages.encode(Raised("frame", "K" * 1000, told, told)))
    assert isinstance(found, Raised)
    assert found.traceback.startswith("first line") and found.traceback.endswith("last line")
    assert "characters left out" in found.message
    assert len(found.kind) < 300


@pytest.mark.parametrize("letter", ["\U0001f600", "\udc80", "\x00"])
def test_the_worst_text_fits_a_packet(letter: str) -> None:
    data = messages.encode(Raised("frame", letter * 10**6, letter * 10**6, letter * 10**6))
    assert len(data) <= messages.PACKET
    ours, theirs = messages.pair()
    with ours, theirs:
        ours.setblocking(False)
        assert ours.send(data) == len(data)
        assert theirs.recv(messages.PACKET) == data


def test_texts_that_utf8_cannot_carry() -> None:
    found = messages.decode_from_worker(messages.encode(Raised("frame", "E", "name \udcff", "")))
    assert isinstance(found, Raised) and found.message == "name \\udcff"


def test_a_message_that_is_too_large_is_refused_here() -> None:
    with pytest.raises(PipeError, match="Spawn"):
        messages.encode(Spawn("a#0", ("x" * messages.PACKET,)))


def test_all_unanswered_requests_fit_the_socket() -> None:
    """So that asking the fork server never blocks the caller; see process.MOST_ASKED."""
    from upipe.runtime.process import MOST_ASKED

    ours, theirs = messages.pair()
    sent, other = messages.pair()
    with ours, theirs, sent, other:
        ours.setblocking(False)
        for number in range(MOST_ASKED):
            socket.send_fds(
                ours,
                [messages.encode(Spawn(f"processor#{number}", ("/usr/bin/python", "/some/long/path" * 10)))],
                [sent.fileno()],
            )
