"""Submitted scripts on this node: `upipe submit --working-dir . script.py`.

    DATA_DIR/jobs/<id>/        0700, one per job; see job_process.py for what lies in it

A job runs in a process session of its own beside a small process that keeps its output and its exit status
(job_process.py). So it goes on when this agent dies, and the next life of the agent finds it, or its status, on disk.
(Under systemd that takes KillMode=process.) Ended jobs are kept, the newest MOST_ENDED of them, and then removed.

In its environment $UPIPE_CLUSTER names this agent and $UPIPE_TOKEN_FILE the file of the token, never the token: so
`pipe.start(cluster="auto")` in the script reaches this cluster. $UPIPE_JOB travels with the pipes that it starts: when
it has ended, however it did, those that go on are ended (pipe_requests.py). A script that is killed says no good-bye,
and would be missed only after desk.BROKEN seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from upipe.cluster import archive, wire
from upipe.cluster.job_process import PIECE, start_time, write_whole
from upipe.cluster.server import Call, Handler, refuse
from upipe.cluster.submitting import JOB_VARIABLE
from upipe.errors import ArchiveRefused
from upipe.pipe import CLUSTER_VARIABLE

MOST_RUNNING = 256
MOST_ENDED = 64
"""Jobs that are kept after their end, with their output."""
GLANCE = 0.1
"""Seconds between two looks at the output of a running job while somebody follows it."""
KILLED = 5.0
"""Seconds in which a killed job must be gone."""
_PROCESS = Path(__file__).with_name("job_process.py")


class Saved(msgspec.Struct, frozen=True):
    """job.json."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    """All of it."""
    request: wire.JobRequest


@dataclass
class Job:
    """One job, running or ended."""

    id: str
    directory: Path
    name: str
    request: wire.JobRequest
    pidfd: int = -1
    process: subprocess.Popen[bytes] | None = None
    """When this life of the agent started it."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def status(self) -> int | None:
        """Exit status, None before the end, or when it was lost."""
        try:
            return int((self.directory / "status").read_text())
        except (FileNotFoundError, ValueError):
            return None

    @property
    def state(self) -> str:
        """running, completed, failed, stopped, or lost (killed with what kept its status)."""
        if not self.ended.is_set():
            return "running"
        if self.status is None:
            return "lost"
        if (self.directory / "stopped").exists():
            return "stopped"
        return "failed" if self.status else "completed"


class Jobs:
    """All jobs of one agent.

    Args:
        directory: DATA_DIR/jobs.
        node: id of this node.
        address: HOST:PORT of this agent, for processes of this host, once it listens.
        access: environment that names the files of the cluster's token, and of certificates of one's own.
        content: bytes of a content that this node holds; None when it does not.
        on_end: told the origin (wire.Origin) of each job that ends while this agent lives.
    """

    def __init__(
        self, directory: Path, node: str, address: Callable[[], str], access: dict[str, str],
        content: Callable[[str], Awaitable[bytes | None]], on_end: Callable[[str], None] = lambda origin: None,
    ) -> None:  # fmt: skip
        self.all: dict[str, Job] = {}
        self._directory = directory
        self._node = node
        self._address = address
        self._access = access
        self._content = content
        self._on_end = on_end
        self._starting = asyncio.Lock()
        directory.mkdir(mode=0o700, exist_ok=True)

    # ------------------------------------------------------------------ life

    def load(self) -> None:
        """Find the jobs of earlier lives; those that run are watched again."""
        for path in sorted(self._directory.iterdir(), key=lambda one: one.stat().st_mtime):
            try:
                saved = msgspec.json.decode((path / "job.json").read_bytes(), type=Saved)
            except (OSError, msgspec.MsgspecError):
                shutil.rmtree(path, ignore_errors=True)  # a crash while it was made: it never ran
                continue
            job = self.all[path.name] = Job(path.name, path, saved.name, saved.request)
            self._watch(job, _living(path))

    async def close(self) -> None:
        """Watch no more; jobs go on. Idempotent."""
        for job in self.all.values():
            self._unwatch(job)

    def _watch(self, job: Job, pidfd: int) -> None:
        if pidfd < 0:
            job.ended.set()
            return
        job.pidfd = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._over, job)

    def _unwatch(self, job: Job) -> None:
        if job.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(job.pidfd)
            os.close(job.pidfd)
            job.pidfd = -1

    def _over(self, job: Job) -> None:
        self._unwatch(job)
        if job.process is not None:
            job.process.wait()
        job.ended.set()
        self._on_end(self._origin(job.id))
        ended = [one for one in self.all.values() if one.ended.is_set()]
        for old in ended[: max(0, len(ended) - MOST_ENDED)]:
            del self.all[old.id]
            shutil.rmtree(old.directory, ignore_errors=True)

    # ------------------------------------------------------------------ running

    async def run(self, request: wire.JobRequest) -> wire.JobInfo:
        """Run a script; asked again with the same id, say how it is.

        Raises:
            NodeRefused: its archive is not here, cannot be unpacked, or has no such script; its id is taken; too many.
        """
        async with self._starting:
            if request.id in self.all:
                if self.all[request.id].request != request:
                    raise refuse(409, "id_taken", f"Another job runs or ran as {request.id}: choose another id.")
                return self.info(request.id)
            if sum(not one.ended.is_set() for one in self.all.values()) >= MOST_RUNNING:
                raise refuse(503, "too_many", f"This node runs {MOST_RUNNING} jobs; wait, or stop one.")
            data = await self._content(request.working_directory)
            if data is None:
                raise refuse(409, "no_content", "Its archive is not here: PUT /v1/code/{sha256} first.")
            return await self._start(request, data)

    async def _start(self, request: wire.JobRequest, data: bytes) -> wire.JobInfo:
        name = request.id or f"{request.name[:40]}-{secrets.token_hex(4)}"
        directory = self._directory / name
        directory.mkdir(mode=0o700)
        try:
            await asyncio.to_thread(archive.unpack, data, directory / "work")
            script = Path(request.arguments[0])
            if script.is_absolute() or ".." in script.parts or not (directory / "work" / script).is_file():
                raise refuse(400, "no_script", f"The working directory holds no script {request.arguments[0]}.")
            saved = Saved(request.name, request.arguments, self._environment(name, request), request)
            write_whole(directory / "job.json", json.dumps(msgspec.to_builtins(saved)))
            process = _beside(directory)
        except ArchiveRefused as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise refuse(400, "bad_archive", str(error)) from None
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        job = self.all[name] = Job(name, directory, request.name, request, process=process)
        self._watch(job, os.pidfd_open(process.pid))
        return self.info(name)

    def _environment(self, job: str, request: wire.JobRequest) -> dict[str, str]:
        own = {CLUSTER_VARIABLE: self._address(), JOB_VARIABLE: self._origin(job), **self._access}
        return {**os.environ, "PYTHONUNBUFFERED": "1", **request.environment, **own}

    async def stop(self, job: str, deadline: float) -> wire.JobInfo:
        """SIGTERM to the script and its children; SIGKILL after `deadline` seconds. Returns when it has ended.

        Raises:
            NodeRefused: 404.
        """
        found = self._job(job)
        if not found.ended.is_set():
            (found.directory / "stopped").touch()
            await self._begun(found)
            for number, seconds in ((signal.SIGTERM, deadline), (signal.SIGUSR1, KILLED)):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(found.pidfd, number)
                try:
                    async with asyncio.timeout(seconds):
                        await found.ended.wait()
                    break
                except TimeoutError:
                    continue
        return self.info(job)

    async def _begun(self, job: Job) -> None:
        """Until the process beside the script takes signals: it has written its pid."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILLED):
                while not job.ended.is_set() and not (job.directory / "pid").exists():  # noqa: ASYNC110 - a file
                    await asyncio.sleep(GLANCE / 10)

    # ------------------------------------------------------------------ telling

    def _origin(self, job: str) -> str:
        return f"{self._node}/{job}"

    def over(self) -> list[str]:
        """Origins of the jobs that are known to have ended."""
        return [self._origin(job.id) for job in self.all.values() if job.ended.is_set()]

    def _job(self, job: str) -> Job:
        found = self.all.get(job)
        if found is None:
            said = f"This node knows no job {job}; of those that ended it keeps the last {MOST_ENDED}."
            raise refuse(404, "no_such_job", said)
        return found

    def info(self, job: str) -> wire.JobInfo:
        """How it is.

        Raises:
            NodeRefused: 404.
        """
        found = self._job(job)
        return wire.JobInfo(found.id, found.name, found.state, self._node, found.status)

    def infos(self) -> wire.Jobs:
        """All, the oldest first."""
        return wire.Jobs(tuple(self.info(job) for job in self.all))

    async def logs(self, job: str) -> AsyncIterator[bytes]:
        """What it printed and prints, until it has ended. Of one that prints more than is kept, the beginning is left
        out, and so many bytes are told in a line.

        Raises:
            NodeRefused: 404.
        """
        found = self._job(job)
        position = 0
        while True:
            over = found.ended.is_set()  # before the look: what is there then is all
            async for piece in _pieces(found.directory, position):
                position = piece[0]
                yield piece[1]
            if over:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GLANCE):
                    await found.ended.wait()

    def handlers(self) -> dict[str, Handler]:
        """Of the routes about jobs."""

        async def jobs(call: Call) -> wire.Jobs:
            return self.infos()

        async def run_job(call: Call) -> wire.JobInfo:
            return await self.run(call.body)

        async def job(call: Call) -> wire.JobInfo:
            return self.info(call.parameters["job"])

        async def logs(call: Call) -> AsyncIterator[bytes]:
            self._job(call.parameters["job"])
            return self.logs(call.parameters["job"])

        async def stop_job(call: Call) -> wire.JobInfo:
            return await self.stop(call.parameters["job"], call.body.deadline)

        return {"jobs": jobs, "run_job": run_job, "job": job, "logs": logs, "stop_job": stop_job}


def _beside(directory: Path) -> subprocess.Popen[bytes]:
    """Start the process beside a script."""
    return subprocess.Popen(
        [sys.executable, "-P", str(_PROCESS), str(directory)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
    )  # fmt: skip


def _living(directory: Path) -> int:
    """pidfd of the process beside the script, -1 when it has ended."""
    try:
        pid, start = map(int, (directory / "pid").read_text().split())
        pidfd = os.pidfd_open(pid)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return -1
    try:
        if start_time(pid) == start:  # the pidfd names the process that was looked at
            return pidfd
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended this instant
    os.close(pidfd)
    return -1


async def _pieces(directory: Path, position: int) -> AsyncIterator[tuple[int, bytes]]:
    """(position behind it, bytes) of the output from a position on, as far as it is there now."""
    names = sorted(name for name in os.listdir(directory) if name.startswith("output."))
    segments = [(int(name.partition(".")[2]), directory / name) for name in names]
    for number, (begin, path) in enumerate(segments):
        if number + 1 < len(segments) and segments[number + 1][0] <= position:
            continue
        if begin > position:
            yield begin, f"upipe: {begin - position:,} bytes of output are left out here\n".encode()
            position = begin
        try:
            with path.open("rb") as file:
                file.seek(position - begin)
                while data := file.read(PIECE):
                    position += len(data)
                    yield position, data
                    await asyncio.sleep(0)
        except FileNotFoundError:
            continue  # it went this instant: the next look tells


__all__ = ["Job", "Jobs"]
