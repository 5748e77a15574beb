"""Which loop runs a function. (What the loops do: tests/test_processor.py)"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from upipe.runtime.mapped import is_async


async def coroutine(value: int) -> int:
    return value


async def async_generator(value: int) -> Any:
    yield value


def plain(value: int) -> int:
    return value


def generator(value: int) -> Any:
    yield value


class Later:
    async def __call__(self, value: int) -> int:
        return value


@pytest.mark.parametrize(
    ("func", "expected"),
    [
        (coroutine, True), (async_generator, True), (functools.partial(coroutine, 1), True), (Later(), True),
        (Later().__call__, True), (plain, False), (generator, False), (functools.partial(plain, 1), False),
        (len, False), (None, False),
    ],
)
def test_what_gives_a_coroutine_or_an_async_generator_is_async(func: Any, expected: bool) -> None:
    assert is_async(func) is expected
