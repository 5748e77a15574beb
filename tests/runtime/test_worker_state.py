"""What a worker decides, as pure functions."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

from upipe.runtime.messages import TEXT
from upipe.runtime.worker_state import describe, key_function, key_hash, verdict


@pytest.mark.parametrize(
    ("on_error", "deliveries", "unreadable", "expected"),
    [
        ("retry", 1, False, "give_back"), ("retry", 4, False, "give_back"), ("retry", 5, False, "bury"),
        ("retry", 9, False, "bury"), ("retry", 1, True, "bury"), ("dead_letter", 1, False, "bury"),
        ("fail", 1, False, "fail"), ("fail", 1, True, "bury"),
    ],
)
def test_a_failed_frame_is_given_back_up_to_its_limit(
    on_error: str, deliveries: int, unreadable: bool, expected: str
) -> None:
    assert verdict(on_error, deliveries, 5, unreadable) == expected


def test_equal_keys_hash_equal_whatever_their_type() -> None:
    assert key_hash(1) == key_hash(1.0) == key_hash(True) == key_hash(np.int64(1)) == key_hash(np.float32(1))
    assert key_hash(("a", 1)) == key_hash(("a", 1.0)) and key_hash(0.0) == key_hash(-0.0)


def test_different_keys_hash_different() -> None:
    keys: list[Any] = [None, 0, 1, -1, 1.5, "", "1", b"1", "a", b"a", "\ud800"]
    keys += [(), (1,), ("1",), (1, 2), ((1,), 2), (1, (2,))]
    assert len({key_hash(key) for key in keys}) == len(keys) and all(0 < key_hash(key) < 2**32 for key in keys)


def test_a_key_hashes_the_same_in_every_process() -> None:
    code = "from upipe.runtime.worker_state import key_hash; print(key_hash(('user', 7)))"
    command = [sys.executable, "-c", code]
    told = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert {int(one) for one in told} == {key_hash(("user", 7))}


def test_a_key_of_another_type_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="not list"):
        key_hash([1])  # type: ignore[arg-type]


def test_a_key_is_a_function_a_field_an_attribute_or_an_index() -> None:
    class Row(NamedTuple):
        user: str

    assert key_function(len)("abc") == 3
    assert key_function("user")({"user": "u"}) == "u" and key_function("user")(Row("v")) == "v"
    assert key_function(1)([5, 6]) == 6


def _fail() -> None:
    raise ValueError("mine")


def test_a_told_error_has_the_users_stack() -> None:
    try:
        _fail()
    except ValueError as error:
        told = describe(error)
    assert (told.kind, told.message) == ("ValueError", "mine") and "in _fail" in told.traceback


def test_an_error_is_bounded_and_told_whatever_it_does_when_asked() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    class Worse(Exception):
        @property
        def __notes__(self) -> Any:
            raise SystemExit

    assert "RuntimeError" in describe(Bad()).message
    assert describe(Worse("x")).kind.endswith("Worse")
    long = describe(ValueError("y" * 10_000_000))
    assert len(long.message) < 2 * TEXT and len(long.traceback) < 100_000 and "left out" in long.message
    describe(ValueError("\udcff")).message.encode()
