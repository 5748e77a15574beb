"""The process that runs a pipe on a node, and outlives the agent: `python -m upipe.cluster.keeper DIR`.

    agent ──Unix socket── KEEPER ── fork server ── workers
                             └── session: queues, spool

Who owns what, and what is left after kill -9:
  - of the agent: nothing changes here; the next agent finds the socket and is told everything;
  - of the keeper: its lock goes, the fork server ends the workers (they could not go on: nobody would recover what one
    of them holds), and the next process of the user sweeps the session. DIR stays, for the agent to look at and remove.
The keeper ends by itself when it obeyed a stop, on SIGTERM (a host that shuts down), and when nobody gives it a plan.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from upipe.cluster import keeping
from upipe.cluster.keeper_line import Line, short_path, socket_path
from upipe.cluster.keeper_output import Output
from upipe.cluster.keeper_runner import NodeRunner
from upipe.cluster.keeping import Fenced, Follow, Hello, Job, KeeperNews
from upipe.errors import MessageInvalid, UpipeError
from upipe.memq import segment

SPACING = 0.05
"""Seconds between two news: what changes in between is told at once."""
ORPHANED = 60.0
"""Seconds without an agent after which a keeper without a plan ends."""
LAST_WORDS = 5.0
"""Seconds that the last news may take to be read."""
FORGET_EVERY, FORGET_TRIES = 0.25, 40
"""Seconds between two looks whether an agent that is gone is dead, and how many: a process with much memory takes a
while to end."""
MOST_LINES = 8
"""Connections at a time: the agent, tools, one that did not hear the end of another."""
IN_USE = 3
"""Exit status when another keeper runs in that directory."""


class Keeper:
    """The server of a NodeRunner.

    Args:
        directory: see keeping.py; the caller holds its lock.
        job: what runs.
    """

    def __init__(self, directory: Path, job: Job) -> None:
        self.directory = directory
        self.job = job
        self.loop = asyncio.get_running_loop()
        self.output = Output(directory / "output")
        self.runner = NodeRunner(job, self.output, self._changed, self._ended)
        self.ended = self.loop.create_future()
        self._lines: dict[Line, int] = {}
        """With the start time of the process at the other end."""
        self._alone: asyncio.Future[None] | None = None
        """Waited for at the end: nobody is connected any more."""
        self._said: KeeperNews | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0
        self._told = True

    async def run(self) -> None:
        """Until it has ended."""
        self.loop.add_reader(self.output.reading, self.output.pump)
        self.loop.add_signal_handler(signal.SIGTERM, self._terminate)
        self.runner.begin()
        server = await self.loop.create_unix_server(self._line, sock=_listen(self.directory))
        orphaned = self.loop.call_later(ORPHANED, self._orphaned)
        await self.ended
        orphaned.cancel()
        server.close()
        await self._last_words()
        socket_path(self.directory).unlink(missing_ok=True)
        self.output.finish()

    def _line(self) -> Line:
        return Line(keeping.to_keeper(), self._opened, self._heard, self._gone)

    # ------------------------------------------------------------------ hearing

    def _opened(self, line: Line) -> None:
        if line.uid != os.geteuid() or len(self._lines) >= MOST_LINES:
            line.close()
            return
        self._lines[line] = segment.start_time(line.pid) or 0
        line.say(keeping.encode(Hello(keeping.PROTOCOL, self.job.pipe, os.getpid())))
        line.say(keeping.encode(self._said or self.runner.news()))

    def _heard(self, line: Line, message: Any) -> None:
        assert isinstance(message, Follow)
        if line not in self._lines:
            return
        if not self.runner.follow(message.fence, message.plan):
            line.say(keeping.encode(Fenced(message.fence, self.runner.fence)))
        elif message.plan is not None and message.fence == self.runner.fence:
            self._note("plan", msgspec.json.encode(message))

    def _gone(self, line: Line, wrong: str) -> None:
        if wrong:
            _complain(f"a connection of process {line.pid} ended: {wrong}")
        start = self._lines.pop(line, 0)
        if start:
            self._forget(line.pid, start, FORGET_TRIES)
        if self._lines:
            return
        if self._alone is not None and not self._alone.done():
            self._alone.set_result(None)
        elif self.runner.node is None:
            self.loop.call_later(ORPHANED, self._orphaned)

    def _forget(self, pid: int, start: int, tries: int) -> None:
        """Give back the places in the queues of an agent that died. Its connection breaks before it counts as dead, and
        one that only let go lives on, and has left its places itself."""
        if not self.runner.forget_agent(pid, start) and tries > 1:
            self.loop.call_later(FORGET_EVERY, self._forget, pid, start, tries - 1)

    def _orphaned(self) -> None:
        if not self._lines and self.runner.node is None:
            self._terminate()

    def _terminate(self) -> None:
        """End, and not because a plan says so: the agent counts what was here as lost."""
        self._told = False
        self.runner.stop()

    # ------------------------------------------------------------------ telling

    def _changed(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_at(max(self.loop.time(), self._next), self._tell)

    def _tell(self) -> None:
        self._timer = None
        news = self.runner.news()
        if news == self._said or (not news.present and not self._told):
            return
        self._said, self._next = news, self.loop.time() + SPACING
        data = keeping.encode(news)
        for line in self._lines:
            line.say(data)

    def _ended(self) -> None:
        if self._told:
            self._note("ended", keeping.encode_file(self.runner.news()))
        if not self.ended.done():
            self.ended.set_result(None)

    async def _last_words(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tell()
        for line in list(self._lines):
            line.close()  # once all is said
        if self._lines:
            self._alone = self.loop.create_future()
            await asyncio.wait([self._alone], timeout=LAST_WORDS)

    def _note(self, name: str, data: bytes) -> None:
        """Replace a file of the directory."""
        temporary = self.directory / f".{name}.new"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self.directory / name)
        except OSError as error:  # for tools, and for an agent that was not there: no reason to end a pipe
            _complain(f"cannot write {self.directory / name}: {error.strerror}")


def _listen(directory: Path) -> socket.socket:
    """The lock is ours, so a socket that lies there is of a dead keeper."""
    socket_path(directory).unlink(missing_ok=True)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    before = os.umask(0o177)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(short_path(fd))
        sock.setblocking(False)
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
        os.close(fd)


def _lock(directory: Path) -> int | None:
    """Held until this process ends, whatever ends it. None: another one has it."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()} {segment.start_time(os.getpid())}\n".encode(), 0)
    return fd


def _complain(text: str) -> None:
    print(f"upipe keeper: {text}", file=sys.stderr, flush=True)


def main(directory: Path) -> int:
    """The process's life; returns its exit status."""
    lock = _lock(directory)
    if lock is None:
        _complain(f"another keeper runs in {directory}")
        return IN_USE
    try:
        job = keeping.decode_job((directory / "job").read_bytes())
        work = Path(job.cwd or directory / "work")
        if not job.cwd:
            work.mkdir(mode=0o700, exist_ok=True)
        (directory / "ended").unlink(missing_ok=True)
        os.chdir(work)
        asyncio.run(_serve(directory, job))
    except (MessageInvalid, UpipeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            _complain(f"no file descriptor is left (ulimit -n): {error}")
        else:
            _complain(str(error))
        return 1
    return 0


async def _serve(directory: Path, job: Job) -> None:
    await Keeper(directory, job).run()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
