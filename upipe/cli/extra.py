"""Commands that need the libraries of a cluster, and say so where they are missing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from upipe.errors import UpipeError

P = ParamSpec("P")
T = TypeVar("T")


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
