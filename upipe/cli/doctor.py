"""`upipe doctor`: what would keep a node from working here, each with what to do."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from upipe.cli import render
from upipe.cli.extra import brings_certificates, needs_cluster
from upipe.settings import Certificates

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Check if a node would work on this host.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address on which the node shall listen.")
@click.option("--port", default=7420, show_default=True, type=click.IntRange(1, 65535), help="And its port.")
@click.option("--cluster", default="", help="Name of the cluster; peers of another one are a problem.")
@click.option("--join", "seeds", multiple=True, metavar="HOST:PORT", help="A node to ask; may be given again.")
@click.option("--token-file", type=_FILE, help="Default $UPIPE_TOKEN_FILE or ~/.config/upipe/token.")
@brings_certificates
@click.option("--json", "as_json", is_flag=True, help="As a JSON list.")
@needs_cluster
def doctor(
    host: str, port: int, cluster: str, seeds: tuple[str, ...], token_file: Path | None,
    own: Certificates | None, as_json: bool,
) -> None:  # fmt: skip
    """Check if a node would work here: shared memory, limits, token, port, multicast, peers, TLS, versions, clocks.

    Exit status 1 when there is a problem. Nothing is changed; peers are asked what they are.
    """
    from upipe.cluster.doctor import Wanted, examine
    from upipe.cluster.probes import SystemProbes

    wanted = Wanted(host, port, cluster, seeds)
    seen = asyncio.run(SystemProbes(token_file, own).look(wanted))
    found = examine(wanted, seen, datetime.now(UTC))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        render.terminal().print(render.findings((one.check, one.level, one.where, one.what, one.todo) for one in found))
    if any(one.level == "problem" for one in found):
        raise SystemExit(1)
