"""`upipe token`: make the cluster's secret, and tell clusters apart."""

from __future__ import annotations

from pathlib import Path

import click

from upipe.cli.extra import needs_cluster


@click.group(short_help="Make the secret of a cluster, or compare it.")
def token() -> None:
    """The secret of a cluster: one file, the same on each host.

    Who holds it can run code on every node.
    """


@token.command(short_help="Make a new secret.")
@click.option("--force", is_flag=True, help="Replace a token: hosts with the old one are closed out.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@needs_cluster
def create(force: bool, path: Path | None) -> None:
    """Make a new secret in PATH (default $UPIPE_TOKEN_FILE or ~/.config/upipe/token).

    It is printed nowhere. Copy the file to each host of the cluster, readable by its user only.
    """
    from upipe.cluster import token as tokens

    path = path or tokens.place()
    secret = tokens.create(path, force)
    click.echo(f"made {path}\nfingerprint {secret.fingerprint}")
    click.echo("Now copy that file to the same place on each host (scp -p keeps it closed).")


@token.command("show-fingerprint", short_help="Print what tells clusters apart.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@needs_cluster
def show_fingerprint(path: Path | None) -> None:
    """Print sixteen digits that are the same on two hosts if and only if their tokens are. They are no secret."""
    from upipe.cluster import token as tokens

    click.echo(tokens.load(path).fingerprint)
