"""`upipe-node`: makes this host a node of a cluster."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click

from upipe.cli.extra import brings_certificates
from upipe.settings import Certificates

_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cluster", default="upipe", show_default=True, help="Its name; nodes of another are refused.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=7420, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--join", multiple=True, metavar="HOST:PORT", help="A node, or dns://NAME:PORT; may be given again.")
@click.option("--labels", multiple=True, metavar="NAME=VALUE", help="What workers may ask for; may be given again.")
@click.option("--resources", multiple=True, metavar="NAME=N", help="Beside, or instead of, what is found.")
@click.option("--data-dir", type=_DIRECTORY, help="Default /var/lib/upipe, or ~/.local/state/upipe/node.")
@click.option("--token-file", type=_FILE, help="Default $UPIPE_TOKEN_FILE or ~/.config/upipe/token.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Name by which browsers and tools may call it.")
@brings_certificates
@click.option("--no-multicast", is_flag=True, help="Neither advertise nor look for others: --join only.")
@click.option("--drain-seconds", default=30.0, show_default=True, help="For workers to move elsewhere before it ends.")
def main(
    cluster: str, host: str, port: int, join: tuple[str, ...], labels: tuple[str, ...], resources: tuple[str, ...],
    data_dir: Path | None, token_file: Path | None, allow_host: tuple[str, ...],
    own: Certificates | None, no_multicast: bool, drain_seconds: float,
) -> None:  # fmt: skip
    """Run the agent of this host: it finds the others, and runs its share of their pipes.

    SIGTERM or Ctrl-C lets workers move elsewhere and ends it; a second one ends it at once. Workers that cannot move go
    on without it, and are found again by its next start with the same --data-dir.
    """
    try:
        from upipe.cluster.node_id import default_data_dir
        from upipe.cluster.options import Options
    except ModuleNotFoundError as error:
        _refuse(f"{error.name} is missing: pip install 'upipe[cluster]'")
    _run(Options(
        cluster, host, port, join, labels, resources, (data_dir or default_data_dir()).absolute(), token_file,
        allow_host, own, not no_multicast, drain_seconds,
    ))  # fmt: skip


def _refuse(sentence: str) -> NoReturn:
    """One sentence and status 2: what stands in the way of the start is for people, not a traceback."""
    print(f"upipe-node: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _run(options: object) -> None:
    from upipe.cluster.agent import serve
    from upipe.cluster.node_id import DataDir
    from upipe.cluster.options import Options, settle
    from upipe.errors import ClusterError

    assert isinstance(options, Options)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        settled = settle(options)
        with DataDir(options.data_dir) as data, asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settled, data, lambda line: print(line, flush=True)))
    except ClusterError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    made: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return made


if __name__ == "__main__":
    main()
