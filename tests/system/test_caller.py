"""The process that started a pipe is interrupted, terminated or killed, in every phase: everything ends within five
seconds."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import termios
import time
from collections.abc import Callable

import pytest

from tests.support import crowded
from tests.system.support import LONGEST, Script, until

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.slow]
Start = Callable[..., Script]
SOON = 5.0
"""Seconds in which all ends, on a machine that has nothing else to do."""

PROGRAM = """
import asyncio, os, signal, subprocess, sys, time
from upipe import Pipe, Processor, Settings

phase, method = sys.argv[1], sys.argv[2]

def endless():
    number = 0
    while True:
        yield number
        number += 1

def same(value):
    return value

def sink(value):
    pass

def stuck(value):
    while True:
        signal.pause()

def child(value):
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["sleep", "1000"], start_new_session=phase == "daemon")
    return os.getpid()

class Loading:
    def __init__(self):
        time.sleep(1000)
    def process(self, value):
        pass

def make(*funcs):
    pipe = Pipe("p", settings=Settings(start_method=method))
    pipe.chain(*[Processor(f"p{number}", func) for number, func in enumerate(funcs)])
    return pipe

async def main():
    if phase == "declared":
        pipe = make(endless, sink)
        print("here")
        await asyncio.sleep(1000)
    elif phase == "start":
        pipe = make(Loading)
        starting = asyncio.create_task(pipe.start())
        while pipe._runner is None or not pipe._runner.held.pidfds:
            await asyncio.sleep(0.001)
        print("here")
        await starting
    elif phase == "running":
        pipe = await make(endless, same, sink).start()
        print("here")
        await pipe.wait_for_completion()
    elif phase == "call":
        pipe = await make(stuck).start()
        call = asyncio.create_task(pipe.call(1))
        await asyncio.sleep(0)
        print("here")
        await call
    elif phase == "results":
        pipe = await make(stuck).start()
        print("here")
        async for value in pipe.results():
            pass
    elif phase == "draining":
        pipe = await make(stuck).start()
        await pipe.emit(1)
        draining = asyncio.create_task(pipe.terminate(1000))
        await asyncio.sleep(0)
        print("here")
        await draining
    elif phase == "stopping":
        while True:
            pipe = await make(endless, sink).start()
            print("here")
            await pipe.stop()
    elif phase == "with":
        async with make(endless, sink) as pipe:
            print("here")
            await asyncio.sleep(1000)
    elif phase == "run-in-loop":
        pipe = make(endless, sink)
        asyncio.get_running_loop().call_later(0.3, print, "never")
        import threading
        threading.Timer(0.5, print, ("here",)).start()
        pipe.run()
    elif phase in ("children", "daemon"):
        pipe = await make(child).start()
        print("server", pipe._runner.held.server.pid, await pipe.call(1))
        print("here")
        await asyncio.sleep(1000)
    elif phase == "forked":
        pipe = await make(endless, sink).start()
        if os.fork() == 0:
            print("child", os.getpid())
            print("here")
            time.sleep(1000)
            os._exit(0)
        await asyncio.sleep(1000)

if phase == "run":
    pipe = make(endless, sink)
    import threading
    threading.Timer(0.5, print, ("here",)).start()
    pipe.run()
elif phase == "uvloop":
    phase = "running"
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""
PHASES = [
    "declared",
    "start",
    "running",
    "call",
    "results",
    "draining",
    "stopping",
    "with",
    "run",
    "run-in-loop",
    "uvloop",
]


def sweep(start: Start, ended: Script) -> None:
    """The next start of anything removes what a killed program left."""
    one = start("from upipe.memq import segment; segment.process_session()", shm=ended.shm)
    assert one.end() == (0, "")
    assert one.leftovers() == []


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_ctrl_c(script: Start, phase: str, group: bool) -> None:
    one = script(PROGRAM, args=(phase, "auto"), start_new_session=True, stderr=-1)
    one.until_line("here")
    if phase == "stopping":
        for _ in range(3 + 4 * group):
            one.until_line("here")
    began = time.monotonic()
    (os.killpg if group else os.kill)(one.process.pid, signal.SIGINT)
    _, err = one.process.communicate(timeout=LONGEST)
    assert one.process.returncode == -signal.SIGINT, err
    assert "KeyboardInterrupt" in err
    until(lambda: not one.others(), SOON * crowded() - (time.monotonic() - began), f"{one.others()} end")
    assert one.leftovers() == []
    assert "fork server failed" not in err and "Exception ignored" not in err, err


def test_ctrl_c_at_a_terminal(script: Start) -> None:
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    try:
        one = script(
            PROGRAM,
            args=("running", "fork"),
            start_new_session=True,
            stdin=theirs,
            stderr=theirs,
            preexec_fn=own_terminal,
        )
        one.until_line("here")
        os.write(ours, b"\x03")
        assert one.end()[0] == -signal.SIGINT
        until(lambda: not one.others(), SOON * crowded())
        assert one.leftovers() == []
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("phase", ["start", "running", "call", "draining", "run", "children"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_caller_is_killed(script: Start, phase: str, number: signal.Signals) -> None:
    one = script(PROGRAM, args=(phase, "auto"))
    one.until_line("here")
    assert one.others()
    os.kill(one.process.pid, number)
    assert one.end()[0] == -number
    until(lambda: not one.others(), SOON * crowded(), f"{one.others()} end")
    sweep(script, one)


@pytest.mark.parametrize("method", ["fork", "exec"])
def test_caller_and_fork_server_are_killed(script: Start, method: str) -> None:
    one = script(PROGRAM, args=("children", method))
    _, server, _ = one.line().split()
    one.until_line("here")
    os.kill(one.process.pid, signal.SIGKILL)
    os.kill(int(server), signal.SIGKILL)
    one.end()
    until(lambda: not one.others(), SOON * crowded(), f"{one.others()} end")
    sweep(script, one)


def test_the_caller_is_killed_and_a_worker_had_a_daemon(script: Start) -> None:
    one = script(PROGRAM, args=("daemon", "fork"))
    one.until_line("here")
    os.kill(one.process.pid, signal.SIGKILL)
    one.end()
    until(lambda: not one.others(), SOON * crowded(), f"{one.others()} end")
    sweep(script, one)


def test_a_child_of_the_caller_does_not_keep_the_workers(script: Start) -> None:
    """It inherited the caller's ends of all sockets: the fork server watches the caller itself."""
    one = script(PROGRAM, args=("forked", "fork"))
    child = int(one.line().split()[1])
    one.until_line("here")
    os.kill(one.process.pid, signal.SIGKILL)
    one.process.wait(LONGEST)
    until(lambda: one.others() == [child], SOON * crowded())
    os.kill(child, signal.SIGKILL)
    one.end()
    sweep(script, one)


def test_a_child_of_the_caller_that_exits_ends_nothing(script: Start) -> None:
    one = script("""
import asyncio, os, sys
from upipe import Pipe, Processor

def same(value):
    return value

pipe = Pipe("p")
pipe.add(Processor("same", same))
loop = asyncio.new_event_loop()
loop.run_until_complete(pipe.start())
if os.fork() == 0:
    sys.exit(0)  # runs the functions registered at exit, and finalizers
os.wait()
print(loop.run_until_complete(pipe.call(1, timeout=60)))
loop.run_until_complete(pipe.wait_for_completion(60))
loop.close()
""")
    assert one.end()[0] == 0
    assert one.leftovers() == []
