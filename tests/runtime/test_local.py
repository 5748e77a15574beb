"""The shell's own parts, without workers: callbacks, holdings, provisions."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from pathlib import Path

import pytest

from upipe.errors import OutOfSharedMemory, PipeError, ProcessorError
from upipe.graph.plan import plan
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.memq import MemQ
from upipe.runtime import answers, messages, provision
from upipe.runtime.holdings import Holdings, abandon, weakly
from upipe.runtime.local import LocalRunner

SPEC = PipeSpec(
    "p", (ProcessorSpec("a", "map", "0" * 64, workers=2), ProcessorSpec("b", "map", "0" * 64)), (EdgeSpec("a", "b"),)
)


class Thing:
    def __init__(self) -> None:
        self.called: list[object] = []
        self.error: Exception | None = None

    def method(self, value: object) -> None:
        self.called.append(value)
        if value == "raise":
            raise ValueError("no")

    def broke(self, error: Exception) -> None:
        self.error = error


def test_callbacks_hold_nothing_and_report_what_they_raise() -> None:
    thing = Thing()
    callback = weakly(thing.method, Thing.broke)
    callback(1)
    callback("raise")
    assert thing.called == [1, "raise"] and isinstance(thing.error, ValueError)
    gone = weakref.ref(thing)
    del thing
    gc.collect()
    assert gone() is None
    callback(2)


async def test_holdings_let_go_of_everything(recwarn: pytest.WarningsRecorder) -> None:
    gc.collect()  # what other tests left warns now
    recwarn.clear()
    before = os.listdir("/proc/self/fd")
    held = Holdings(asyncio.get_running_loop(), 9001, [])
    os.makedirs(held.spool)
    for _ in range(2):  # a second life replaces the first
        ours, theirs = messages.pair()
        theirs.close()
        held.keep_socket("a#0", ours)
        held.watch(ours.fileno(), print)
        held.keep_pidfd("a#0", os.pidfd_open(os.getpid()))
    called: list[int] = []
    held.later("x", 0.0, called.append, 1)
    abandon(held, "p")
    assert held.released and not held.spool.exists()
    held.release()
    await asyncio.sleep(0)
    assert called == []
    assert len([one for one in recwarn.list if one.category is ResourceWarning]) == 1
    recwarn.clear()
    now = set(os.listdir("/proc/self/fd"))
    assert len(now) <= len(before) + 1  # the session's lock, when this was the first use


def test_a_child_owns_nothing_of_it() -> None:
    loop = asyncio.new_event_loop()
    held = Holdings(loop, 9002, [])
    os.makedirs(held.spool)
    pid = os.fork()
    if pid == 0:
        abandon(held, "p")
        held.release()
        os._exit(0 if held.spool.exists() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    held.release()
    loop.close()


def test_assignments_name_everything_by_the_pipes_number(tmp_path: Path) -> None:
    spool = tmp_path / "session" / "p7"
    spool.mkdir(parents=True)
    path = provision.write_code(spool, b"code")
    assert provision.write_code(spool, b"code") == path
    found = provision.assignments(SPEC, plan(SPEC), 7, spool, {"a": path})
    assert list(found) == ["a#0", "a#1", "b#0"]
    one = found["a#1"]
    assert (one.session, one.spool, one.code, one.index, one.workers) == ("session", str(spool), path, 1, 2)
    assert one.sources == ("",) and found["b#0"].sources == ("a",)
    names = {*one.inputs, one.replies, *(name for output in one.outputs for name in output.queues)}
    assert all(name.startswith("p7.") for name in names)


async def test_replies_find_their_calls() -> None:
    loop = asyncio.get_running_loop()
    with MemQ(1 << 16) as replies:
        calls = {number: loop.create_future() for number in range(1, 5)}
        futures = dict(calls)
        answering = asyncio.create_task(answers.answer("p", replies, calls))
        replies.send("one", -1, 0.0, 1)
        replies.send("again", -1, 0.0, 1)
        record = {"processor": "a", "worker": "a#0", "kind": "E", "message": "m", "traceback": "t"}
        replies.send(record, 19, 0.0, 2, 0, 2 | 4)
        assert await futures[1] == "one"
        with pytest.raises(ProcessorError, match="E: m"):
            await futures[2]
        futures[3].cancel()
        replies.send("three", -1, 0.0, 3)
        replies.close_producer(0)
        await answering
        with pytest.raises(PipeError, match="without an answer"):
            await futures[4]


async def test_stop_of_what_never_began() -> None:
    runner = LocalRunner(SPEC, plan(SPEC), {})
    await runner.stop()
    assert runner.report().state == "declared" and runner.dead_letters() == []


async def test_start_that_fails_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OutOfSharedMemory("none left")

    monkeypatch.setattr(provision, "make_queue", refuse)
    runner = LocalRunner(SPEC, plan(SPEC), {})
    with pytest.raises(OutOfSharedMemory):
        await runner.start()
    assert runner.state == "failed" and runner.supervisor.reasons == ["none left"]
    assert runner.held.released
    await runner.stop()
