"""`upipe submit`, and what becomes of a submitted script: `upipe jobs`, `upipe logs`, `upipe stop`."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from upipe.cli import render
from upipe.cli.extra import Asked, asks, needs_cluster
from upipe.errors import NodeTimeout, NodeUnreachable

if TYPE_CHECKING:
    from upipe.cluster.client import Client
    from upipe.cluster.wire import JobInfo

T = TypeVar("T")
STOP_SECONDS = 10.0
"""Seconds that a script has to end when Ctrl-C stops it."""
RETRIES = 60
"""Seconds that an agent may be away (a restart) before following its job is given up."""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Run a script on the cluster, and follow its output.",
)
@asks
@click.option("--cluster", default="", help="Name that the cluster must have.")
@click.option("--name", default="", help="Of the job; default the script's.")
@click.option("--env", "environment", multiple=True, metavar="K=V", help="For the script; may be given again.")
@click.option("--detach", is_flag=True, help="Print the id of the job and return; see `upipe logs`.")
@click.option(
    "--working-dir", default=".", show_default=True, type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Directory that travels, and where the script runs.",
)  # fmt: skip
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@needs_cluster
def submit(
    to: Asked, cluster: str, name: str, environment: tuple[str, ...], detach: bool, working_dir: Path, script: str,
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    """Run a script on a node of the cluster, follow its output, and end with its exit status.

    The working directory goes along (without .git, caches and virtual environments); SCRIPT is a path inside it. In the
    script `pipe.start(cluster="auto")` means this cluster. Ctrl-C stops the script, which has 10 s to end; a second one
    leaves it running. When only this command dies, the script goes on: `upipe jobs` finds it.
    """
    if not (working_dir / script).is_file():
        raise click.UsageError(f"there is no {script} in {working_dir}: name the script as seen from there")
    pairs = dict(_pair(text) for text in environment)
    words = (Path(script).as_posix(), *arguments)
    job = _run(_submitted(to, cluster, name or Path(script).stem, working_dir, words, pairs))
    if detach:
        click.echo(job.job)
        return
    raise SystemExit(_followed(to, job.job))


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise click.UsageError(f"--env {text!r}: write NAME=VALUE")
    return key, value


@click.command(short_help="List submitted scripts.")
@asks
@needs_cluster
def jobs(to: Asked) -> None:
    """List the scripts that were submitted to a node."""
    render.terminal().print(_run(_jobs(to)))


@click.command(short_help="Print what a submitted script prints.")
@asks
@click.argument("job")
@needs_cluster
def logs(to: Asked, job: str) -> None:
    """Print what JOB printed, and go on until it has ended; ends with its exit status. Ctrl-C only ends the looking."""
    try:
        raise SystemExit(asyncio.run(_follow(to, job)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@click.command(short_help="Stop a submitted script.")
@asks
@click.option("--deadline", default=STOP_SECONDS, show_default=True, help="Seconds to end by itself.")
@click.argument("job")
@needs_cluster
def stop(to: Asked, deadline: float, job: str) -> None:
    """Stop JOB: SIGTERM, and SIGKILL after the deadline."""
    info = _run(_stop(to, job, deadline))
    click.echo(f"{info.job} {info.state}" + ("" if info.status is None else f" with exit status {info.status}"))


# ---------------------------------------------------------------------------------------------------- doing


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def _client(to: Asked, cluster: str = "") -> Client:
    from upipe.cluster.reach import reach

    return (await reach(to.where, cluster=cluster, own=to.own)).client()


async def _submitted(
    to: Asked, cluster: str, name: str, directory: Path, words: tuple[str, ...], environment: dict[str, str]
) -> JobInfo:
    from upipe.cluster import archive, wire
    from upipe.cluster.routes import RUN_JOB
    from upipe.cluster.submitting import upload

    data = archive.pack(directory)
    digest = hashlib.sha256(data).hexdigest()
    plain = "".join(one if one.isalnum() or one in "._-" else "-" for one in name).lstrip("._-")[:40] or "job"
    async with await _client(to, cluster) as client:
        await upload(client, [(digest, data)])
        job = wire.JobRequest(plain, words, digest, environment, f"{plain}-{secrets.token_hex(4)}")
        return await client.call(RUN_JOB, job)


def _followed(to: Asked, job: str) -> int:
    """Exit status of the script; Ctrl-C stops it first."""
    try:
        return _run(_follow(to, job))
    except KeyboardInterrupt:
        click.echo(f"stopping job {job} (Ctrl-C again leaves it running)", err=True)
    try:
        _run(_stop(to, job, STOP_SECONDS))
    except KeyboardInterrupt:
        click.echo(f"job {job} goes on: `upipe logs {job}`, `upipe stop {job}`", err=True)
    return 130


async def _follow(to: Asked, job: str) -> int:
    """Print its output until it has ended. An agent that restarts is waited for: the job goes on meanwhile."""
    from upipe.cluster.routes import JOB

    printed, failures = 0, 0
    async with await _client(to) as client:
        while True:
            try:
                printed = await _print_from(client, job, printed)
                info = await client.call(JOB, job=job)
                failures = 0
                if info.state != "running":
                    return _status(info)
            except (NodeUnreachable, NodeTimeout):
                failures += 1
                if failures > RETRIES:
                    raise
                await asyncio.sleep(1.0)


async def _print_from(client: Client, job: str, printed: int) -> int:
    """Print what comes after the first `printed` bytes; returns how many there are now, also when it breaks."""
    from upipe.cluster.routes import LOGS

    skip = printed
    try:
        async for piece in client.stream(LOGS, job=job):
            rest, skip = piece[skip:], max(0, skip - len(piece))
            sys.stdout.buffer.write(rest)
            sys.stdout.buffer.flush()
            printed += len(rest)
    except (NodeUnreachable, NodeTimeout):
        pass  # whoever asks for its state next finds out whether the agent is gone
    return printed


def _status(info: JobInfo) -> int:
    """As a shell tells it: 128 + signal; 1 when it is not known."""
    if info.status is None:
        click.echo(f"job {info.job} was {info.state}: its exit status is not known", err=True)
        return 1
    return info.status if info.status >= 0 else 128 - info.status


async def _jobs(to: Asked) -> render.Picture:
    from upipe.cluster.routes import JOBS

    async with await _client(to) as client:
        found = await client.call(JOBS)
    rows = [(one.job, one.state, "" if one.status is None else str(one.status), one.node) for one in found.jobs]
    return render.listing(("job", "state", "status", "node"), rows, "no jobs")


async def _stop(to: Asked, job: str, deadline: float) -> JobInfo:
    from upipe.cluster import wire
    from upipe.cluster.routes import STOP_JOB

    async with await _client(to) as client:
        return await client.call(STOP_JOB, wire.Stopping(deadline), seconds=deadline + 10.0, job=job)
