"""What commands that speak of a cluster share: its libraries, the agent they ask, certificates of one's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from upipe.errors import UpipeError
from upipe.settings import Certificates

P = ParamSpec("P")
T = TypeVar("T")

_FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True)
class Asked:
    """The agent that a command asks, and how."""

    where: str
    """"auto" or HOST:PORT."""
    own: Certificates | None = None


def needs_cluster(command: Callable[P, T]) -> Callable[P, T]:
    """The command's own imports may fail, and what it raises on purpose is told in one sentence."""

    @functools.wraps(command)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except ModuleNotFoundError as error:
            raise click.ClickException(f"{error.name} is missing: pip install 'upipe[cluster]'") from None
        except UpipeError as error:
            raise click.ClickException(str(error)) from None

    return told


def brings_certificates(command: Callable[..., T]) -> Callable[..., T]:
    """Options for certificates of one's own; the command gets them as `own`, or None."""

    @click.option("--ca", type=_FILE, envvar="UPIPE_CA", help="Certificates of your own: the CA,")
    @click.option("--certificate", type=_FILE, envvar="UPIPE_CERTIFICATE", help="this host's certificate,")
    @click.option("--key", type=_FILE, envvar="UPIPE_KEY", help="and its key. Or $UPIPE_CA, _CERTIFICATE and _KEY.")
    @functools.wraps(command)
    def told(*args: Any, ca: Path | None, certificate: Path | None, key: Path | None, **kwargs: Any) -> T:
        if ca and certificate and key:
            return command(*args, own=Certificates(str(ca), str(certificate), str(key)), **kwargs)
        if ca or certificate or key:
            raise click.UsageError(
                "--ca, --certificate and --key go together (or $UPIPE_CA, $UPIPE_CERTIFICATE and $UPIPE_KEY)"
            )
        return command(*args, own=None, **kwargs)

    return told


def asks(command: Callable[..., T]) -> Callable[..., T]:
    """Options for the agent to ask; the command gets an Asked as `to`."""

    @click.option("--to", default="auto", metavar="HOST:PORT", help="Agent to ask; default as start(cluster='auto').")
    @brings_certificates
    @functools.wraps(command)
    def told(*args: Any, to: str, own: Certificates | None, **kwargs: Any) -> T:
        return command(*args, to=Asked(to, own), **kwargs)

    return told
