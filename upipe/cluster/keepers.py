"""The agent's end of a keeper: starts it, finds it again, speaks to it, learns of its death.

The keeper is a child of the agent that started it, in a session of its own: it is reaped here, and lives on when the
agent dies. (systemd: `KillMode=process`, or stopping the agent's unit ends the keepers too.)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import upipe
from upipe.cluster import halts, keeping, token
from upipe.cluster.keeper_line import Line, short_path, socket_path
from upipe.cluster.keeping import SPOOL, Fenced, Follow, Hello, Job, KeeperNews
from upipe.cluster.layout import NodePlan
from upipe.errors import ClusterError, KeeperFailed, MessageInvalid
from upipe.memq import segment
from upipe.runtime import spool
from upipe.runtime.spool import DeadLetter

START = 20.0
"""Seconds a keeper may take until it answers. Long: a loaded machine needs a second for the interpreter alone."""
LOOK = 0.02
"""Seconds between two tries to reach one that is about to listen."""
REACH = 5.0
"""Seconds that a keeper which lives may take to answer when its connection broke."""
SWEEP = 2.0
"""Seconds until the sessions of a dead keeper's workers, which die after it, are swept too."""
_log = logging.getLogger(__name__)


class Keeper:
    """The keeper of one pipe on this node.

    Args:
        directory: <data-dir>/pipes/<pipe id>; made with mode 0700.
        on_news: called with each news, in the loop.
        on_lost: called with the reason when it died without being told to: everything it had is gone.
    """

    def __init__(
        self, directory: Path, on_news: Callable[[KeeperNews], None], on_lost: Callable[[str], None]
    ) -> None:
        self.directory = directory
        self.pid = 0
        """Of the keeper; 0 while none is known."""
        self.news: KeeperNews | None = None
        """The newest."""
        self._on_news = on_news
        self._on_lost = on_lost
        self._pidfd = -1
        self._line: Line | None = None
        self._hello: asyncio.Future[None] | None = None
        self._newest: bytes | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._halt = halts.Halt()
        self._looking: asyncio.TimerHandle | None = None
        self._why = ""
        """Why it was killed."""

    # ------------------------------------------------------------------ beginning

    async def start(self, job: Job) -> None:
        """Start the process, unless one lives there, and connect.

        Raises:
            KeeperFailed: it does not start, or does not answer within START seconds. Nothing runs then.
            ClusterError: the disk is full.
        """
        if await self.find():
            return
        self.news = None
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(self.directory / "job", keeping.encode_file(job))
            process = self._spawn()
        except OSError as error:
            told = f"cannot start a keeper in {self.directory}: {error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ClusterError(f"{told}; make room on that disk") from error  # passes: no reason to fail the pipe
            raise KeeperFailed(told) from error
        try:
            async with asyncio.timeout(START):
                while not await self._connect():
                    if process.poll() is not None:
                        raise KeeperFailed(
                            f"the keeper of pipe {job.pipe!r} ended as it started (status {process.returncode}): "
                            f"{self._last_line()} ({self.output()})"
                        )
                    await asyncio.sleep(LOOK)
        except BaseException as error:
            if process.poll() is None:
                process.kill()
                process.wait()
            if isinstance(error, TimeoutError):
                raise KeeperFailed(
                    f"the keeper of pipe {job.pipe!r} did not answer within {START:g} s; {self.output()} may tell why"
                ) from None
            raise
        process.returncode = 0  # reaped by _reap(); Popen shall not

    def _spawn(self) -> subprocess.Popen[bytes]:
        root = Path(upipe.__file__).parents[1]
        safe = ["-P"] if root != Path.cwd() else []  # or what lies in the working directory would be imported
        with open(self.output(), "ab", opener=_private) as output:
            return subprocess.Popen(
                [sys.executable, *safe, "-m", "upipe.cluster.keeper", str(self.directory.absolute())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=token.without_token(os.environ),
            )

    async def find(self) -> bool:
        """Connect to the keeper that lives there. False: none does.

        Raises:
            KeeperFailed: one lives and does not answer within REACH seconds.
        """
        if self._line is not None:
            return True
        trouble = ""
        try:
            async with asyncio.timeout(REACH):
                while True:
                    try:
                        if not self._lives():
                            self._remove_socket()
                            self._sweep()  # one that died while no agent lived has left its session
                            return False
                        if await self._connect():
                            return True
                    except OSError as error:  # out of descriptors, say: that passes, and proves nothing of the keeper
                        trouble = f" ({error})"
                    await asyncio.sleep(LOOK)
        except TimeoutError:
            raise KeeperFailed(
                f"the keeper in {self.directory} lives and does not answer within {REACH:g} s{trouble}; "
                f"look at {self.output()}, or kill it: what it runs is then begun elsewhere"
            ) from None

    def _sweep(self) -> None:
        _sweep()
        asyncio.get_running_loop().call_later(SWEEP, _sweep)

    def _holder(self) -> int:
        """A pidfd of the process that holds its lock, as the file says; -1: none does."""
        try:
            pid, start = map(int, (self.directory / "lock").read_text().split())
            fd = os.pidfd_open(pid)
        except (OSError, ValueError):
            return -1
        if segment.start_time(pid) == start:  # looked at after the pidfd was had: it is that very process
            return fd
        os.close(fd)
        return -1

    def _lives(self) -> bool:
        """Whether somebody holds its lock."""
        with self._asked_for_lock() as free:
            return free is False

    def _remove_socket(self) -> None:
        """Of one that was killed. Under the lock, since it may be that of a next one a moment later."""
        with self._asked_for_lock() as free:
            if free:
                socket_path(self.directory).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _asked_for_lock(self) -> Iterator[bool | None]:
        """True: its lock was free, and is held meanwhile; False: a keeper holds it; None: there never was one."""
        try:
            fd = os.open(self.directory / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            yield _locked(fd)
        finally:
            os.close(fd)

    async def _connect(self) -> bool:
        """False: nobody listens yet."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(short_path(directory))
            finally:
                os.close(directory)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()
            return False
        except BaseException:
            sock.close()
            raise
        self._hello = loop.create_future()
        _, line = await loop.create_unix_connection(
            lambda: Line(keeping.from_keeper(), lambda line: None, self._heard, self._gone), sock=sock
        )
        try:
            await asyncio.wait_for(self._hello, REACH)
        except (TimeoutError, ConnectionError):
            line.close()
            return False
        except BaseException:
            line.close()
            raise
        return True

    # ------------------------------------------------------------------ speaking

    def follow(self, fence: tuple[int, int], plan: NodePlan | None) -> None:
        """Have it do what a plan says; None: end everything, and itself. Idempotent; a lower fence than that of the
        plan it follows is refused there, and logged here. Said again to a keeper that was out of reach.

        Raises:
            MessageInvalid: the plan is too large.
        """
        self._newest = keeping.encode(Follow(fence, plan))
        if self._line is not None:
            self._line.say(self._newest)

    async def letters(self) -> list[DeadLetter]:
        """The dead letters that lie there, [] when there is no keeper any more."""
        if self.news is None or not self.news.session:
            return []
        path = segment.root() / self.news.session / SPOOL
        try:
            return await asyncio.to_thread(spool.letters, path)
        except FileNotFoundError:
            return []  # it ended

    def output(self) -> Path:
        """File with what the workers print; output.1 beside it is what came before."""
        return self.directory / "output"

    def last_word(self) -> KeeperNews | None:
        """What a keeper said that obeyed a stop and is gone. None: it lives, died otherwise, or never was."""
        try:
            return keeping.decode_ended((self.directory / "ended").read_bytes())
        except (FileNotFoundError, MessageInvalid):
            return None

    def close(self) -> None:
        """Let go of it: it lives on when the agent ends. One that said its last word is reaped when it has ended.
        Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._look_away()
        if self._task is not None:
            self._task.cancel()
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._pidfd >= 0 and self.news is not None and not self.news.present:
            asyncio.get_running_loop().add_reader(self._pidfd, self._buried)
        else:
            self._unwatch()

    def _buried(self) -> None:
        self._reap()
        self._unwatch()

    def kill(self) -> None:
        """End it, and all it has, at once: on_lost() follows, if it was found."""
        if self._pidfd < 0:
            self._pidfd = self._holder()
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # it died this instant
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    # ------------------------------------------------------------------ hearing

    def _heard(self, line: Line, message: Any) -> None:
        if isinstance(message, Hello):
            self._greeted(line, message)
        elif line is not self._line:
            return
        elif isinstance(message, KeeperNews):
            self.news = message
            self._on_news(message)
        elif isinstance(message, Fenced):
            _log.warning(
                "%s: a plan of fence %s was refused, the keeper follows %s", self.directory.name, message.fence,
                message.kept,
            )

    def _greeted(self, line: Line, hello: Hello) -> None:
        assert self._hello is not None
        if hello.protocol != keeping.PROTOCOL or line.uid != os.geteuid():
            error = KeeperFailed(
                f"the keeper in {self.directory} (process {line.pid}) speaks version {hello.protocol} of its protocol, "
                f"this agent {keeping.PROTOCOL}: end its pipe, or run the uPipe that started it"
            )
            self._hello.set_exception(error)
            line.close()
            return
        if self._pidfd < 0:
            self._pidfd = os.pidfd_open(line.pid)
        self._line, self.pid = line, line.pid
        self._halt = halts.Halt()
        self._look()
        if self._newest is not None:
            line.say(self._newest)
        self._hello.set_result(None)

    def _gone(self, line: Line, wrong: str) -> None:
        if self._hello is not None and not self._hello.done():
            self._hello.set_exception(ConnectionResetError(wrong or "it closed the connection"))
        if line is self._line and not self._closed:
            self._line = None
            self._look_away()
            self._task = asyncio.get_running_loop().create_task(self._lost(wrong))

    # ------------------------------------------------------------------ its end

    def _look(self) -> None:
        """Whether it was stopped: its connection stays then, and it never answers again."""
        loop = asyncio.get_running_loop()
        try:
            state = segment.process_state(self.pid)
        except OSError:  # no descriptor to be had just now
            state = "?"
        if self._halt.look(state, loop.time()):
            self._why = (
                f"it was stopped (SIGSTOP) for {halts.GRACE:g} s and is killed, so that what ran here begins elsewhere"
            )
            self.kill()
            return
        self._looking = loop.call_later(halts.EVERY, self._look)

    def _look_away(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    async def _lost(self, wrong: str) -> None:
        """The connection broke: mostly because the keeper ended."""
        if not await self._died(REACH):
            with contextlib.suppress(KeeperFailed):
                if await self.find():
                    return
            _log.warning("%s: the keeper does not answer and is killed (%s)", self.directory.name, wrong)
            self.kill()
            await self._died(REACH)
        status = self._reap()
        self._unwatch()
        self._remove_socket()
        self.pid, self._newest = 0, None  # another life shall not begin with a plan of this one
        if self.news is None or self.news.present:
            self._sweep()
            self._on_lost(self._why or f"the keeper of this pipe ended{status}: {self._last_line()}")
            self._why = ""

    async def _died(self, seconds: float) -> bool:
        """Whether the process ends within that time."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def died() -> None:
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(self._pidfd, died)
        try:
            done, _ = await asyncio.wait([ended], timeout=seconds)
            return bool(done)
        finally:
            if self._pidfd >= 0 and not self._closed:  # else close() did, and may have put its own there
                loop.remove_reader(self._pidfd)

    def _reap(self) -> str:
        """No zombie is left; how it ended, as far as its parent knows."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return ""  # another agent's child, or reaped by a SIGCHLD handler
        if not pid:
            return ""
        code = os.waitstatus_to_exitcode(status)
        return f" (signal {-code})" if code < 0 else f" (exit status {code})"

    def _unwatch(self) -> None:
        """Before the descriptor is closed nobody may wait for it any more: the next file gets its number."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _last_line(self) -> str:
        try:
            with open(self.output(), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:500] if lines else "it wrote nothing"


def _locked(fd: int) -> bool:
    """False: somebody else holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep() -> None:
    """What cannot be swept now is swept by whoever starts next; that the keeper is lost has to be told in any case."""
    try:
        segment.sweep()
    except OSError as error:
        _log.error("what a dead keeper left in shared memory cannot be removed: %s", error)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb", opener=_private) as file:
        file.write(data)
    os.replace(temporary, path)
