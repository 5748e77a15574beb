"""`upipe submit`, and what becomes of a submitted script: `upipe jobs`, `upipe logs`, `upipe stop`."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from upipe.cli import asking, render
from upipe.cli.extra import Asked, asks, needs_cluster
from upipe.errors import NodeRefused, NodeTimeout, NodeUnreachable

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
    job = _job_id(name or Path(script).stem)
    try:
        info = _run(_submitted(to, cluster, job, working_dir, words, pairs))
    except KeyboardInterrupt:
        click.echo(f"job {job} may have been started this instant: see `upipe jobs`", err=True)
        raise
    if detach:
        click.echo(job)
        return
    status = _followed(to, job)
    if status not in (0, 130):
        click.echo(f"job {job} on node {info.node} ended with exit status {status}", err=True)
    raise SystemExit(status)


def _job_id(name: str) -> str:
    plain = re.sub("[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:40] or "job"
    return f"{plain}-{secrets.token_hex(4)}"


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise click.UsageError(f"--env {text!r}: write NAME=VALUE")
    return key, value


@click.command(short_help="List submitted scripts.")
@asks
@needs_cluster
def jobs(to: Asked) -> None:
    """List the scripts that were submitted to any node of the cluster."""
    render.terminal().print(_run(_jobs(to)))


@click.command(short_help="Print what a submitted script prints.")
@asks
@click.argument("job")
@needs_cluster
def logs(to: Asked, job: str) -> None:
    """Print what JOB printed, and go on until it has ended; ends with its exit status. Ctrl-C only ends the looking."""
    raise SystemExit(_run(_follow(to, job)))


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


async def _client_for(to: Asked, job: str) -> Client:
    """To the node that runs or ran the job, whichever was asked to. Close it.

    Raises:
        NodeRefused: none of those that answer knows it.
    """
    from upipe.cluster.routes import JOB

    found = await asking.reached(to)
    async with found.client() as client:
        try:
            await client.call(JOB, job=job)
            return found.client()
        except NodeRefused as error:
            if error.code != "no_such_job":
                raise
    others = [node for node in found.addresses if node != found.node]
    async with asking.peers(found) as peers:
        known, failed = await asking.everywhere(
            others, lambda node: peers.call(node, JOB, seconds=asking.SECONDS, job=job)
        )
    for node in known:
        return await asking.client_of(found, node)
    said = [f"no node that answers knows job {job}: `upipe jobs` lists those that are kept", *asking.silent(failed)]
    raise click.ClickException("; ".join(said))


async def _submitted(
    to: Asked, cluster: str, job: str, directory: Path, words: tuple[str, ...], environment: dict[str, str]
) -> JobInfo:
    from upipe.cluster import archive, wire
    from upipe.cluster.routes import RUN_JOB
    from upipe.cluster.submitting import upload

    data = archive.pack(directory)
    digest = hashlib.sha256(data).hexdigest()
    async with await asking.client(to, cluster) as client:
        await upload(client, [(digest, data)])
        request = wire.JobRequest(job.rpartition("-")[0], words, digest, environment, job)
        return await client.call(RUN_JOB, request)


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
    async with await _client_for(to, job) as client:
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

    reached = await asking.reached(to)
    async with asking.peers(reached) as peers:
        known, failed = await asking.everywhere(
            reached.addresses, lambda node: peers.call(node, JOBS, seconds=asking.SECONDS)
        )
    found = [job for node in sorted(known) for job in known[node].jobs]
    rows = [(one.job, one.state, "" if one.status is None else str(one.status), one.node) for one in found]
    return render.listing(("job", "state", "status", "node"), rows, "no jobs", asking.silent(failed))


async def _stop(to: Asked, job: str, deadline: float) -> JobInfo:
    from upipe.cluster import wire
    from upipe.cluster.routes import STOP_JOB

    async with await _client_for(to, job) as client:
        return await client.call(STOP_JOB, wire.Stopping(deadline), seconds=deadline + 10.0, job=job)
