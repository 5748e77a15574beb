"""Counting and checking what arrives. The fast path is C (zip, iterators); a slow path counts the trouble."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Silence: tuple[type[BaseException], ...] = (TimeoutError,)
"""What receivers raise when nothing came for PATIENCE seconds: the rest is lost. Adapters add their library's own."""
PATIENCE = 2.0


def silence(error: type[BaseException]) -> None:
    """Take that exception for silence, too."""
    global Silence
    Silence = (*Silence, error)


class Tally:
    """Counts of one consumer, and when its first measured and its last value came."""

    def __init__(self, n: int, warm: int) -> None:
        self.total = n + warm
        self.warm = warm
        self.arrived = 0
        self.bad = 0
        self.started = 0.0
        self.ended = 0.0
        self.cut = False  # silence ended it

    def _begin(self) -> None:
        self.started = time.perf_counter()

    def _finish(self) -> None:
        self.ended = time.perf_counter() - (PATIENCE if self.cut else 0.0)

    @property
    def seconds(self) -> float:
        return max(self.ended - self.started, 1e-9)

    @property
    def rate(self) -> float:
        """Measured values per second."""
        return max(0, self.arrived - self.warm) / self.seconds

    def values(self, values: Iterator[int]) -> None:
        """0, 1, 2, ... one at a time."""
        try:
            expected = self._run(values, 0, self.warm)
            self._begin()
            self._run(values, expected, self.total)
        except Silence:
            self.cut = True
        self._finish()

    def _run(self, values: Iterator[int], expected: int, end: int) -> int:
        """Up to value end - 1. Returns the next one expected."""
        while expected < end:
            position = expected - 1
            try:
                for position, value in zip(range(expected, end), values, strict=False):
                    if value != position:
                        break
                else:
                    self.arrived += end - expected
                    return end
            except Silence:
                self.arrived += position - expected + 1
                raise
            self.arrived += position - expected + 1
            if value < position:
                self.bad += 1  # twice, or overtaken
                expected = position
            else:
                expected = value + 1  # those between are lost, or come later
        return expected

    async def awaited(self, get: Callable[[], Awaitable[int]]) -> None:
        """0, 1, 2, ... each awaited."""
        for expected in range(self.total):
            if expected == self.warm:
                self._begin()
            if await get() != expected:
                self.bad += 1
        self.arrived = self.total
        self._finish()

    async def awaited_frames(self, get: Callable[[], Awaitable[Any]], source: Source, touch: bool) -> None:
        """Frames, each awaited."""
        for expected in range(self.total):
            if expected == self.warm:
                self._begin()
            words = (await get()).view(np.uint64)
            if (words.size and int(words[0]) != expected) or not source.intact(words, touch):
                self.bad += 1
        self.arrived = self.total
        self._finish()

    def batches(self, batches: Iterable[Any]) -> None:
        """0, 1, 2, ... in arrays or lists."""
        known = np.arange(self.total, dtype=np.uint64)
        position = 0
        if self.warm == 0:
            self._begin()
        try:
            for batch in batches:
                size = len(batch)
                same = (
                    bool((batch == known[position : position + size]).all())
                    if isinstance(batch, np.ndarray)
                    else list(batch) == list(range(position, position + size))
                )
                self.bad += 0 if same else 1
                position += size
                if not self.started and position >= self.warm:
                    self._begin()
                    self.warm = position
                if position >= self.total:
                    break
        except Silence:
            self.cut = True
        self.arrived = position
        self._finish()

    def frames(self, frames: Iterator[NDArray[np.uint8]], source: Source, touch: bool, copy: bool) -> None:
        """Frames stamped 0, 1, 2, ...; `copy`: into a private buffer first."""
        mine = np.empty(source.size // 8, np.uint64) if copy else None
        expected = 0
        if self.warm == 0:
            self._begin()
        try:
            for frame in frames:
                words = frame.reshape(-1).view(np.uint64)
                if mine is not None:
                    np.copyto(mine, words)
                    words = mine
                stamp = int(words[0]) if words.size else expected
                self.arrived += 1
                if stamp < expected or not source.intact(words, touch):
                    self.bad += 1
                expected = max(expected, stamp + 1)
                del frame, words
                if self.arrived == self.warm:
                    self._begin()
                if self.arrived >= self.total:
                    break
        except Silence:
            self.cut = True
        self._finish()


NOTHING = np.empty(0, np.uint8)


def as_array(buffer: Any) -> NDArray[np.uint8]:
    """The bytes of a buffer, without a copy."""
    return np.frombuffer(buffer, np.uint8) if len(buffer) else NOTHING


class Source:
    """The frame a producer sends: random bytes, its number in the first word."""

    def __init__(self, size: int, shape: tuple[int, ...] = ()) -> None:
        self.size = size
        words = np.random.default_rng(7).integers(0, 2**63, size // 8, np.uint64)
        words[:1] = 0
        self.words = words
        self.array = words.view(np.uint8).reshape(shape or (words.size * 8,))
        self.sum = int(words.sum(dtype=np.uint64))
        self.last = int(words[-1]) if words.size > 1 else None

    def stamp(self, number: int) -> NDArray[np.uint8]:
        """The frame with that number."""
        self.words[:1] = number
        return self.array

    def intact(self, words: NDArray[np.uint64], touch: bool) -> bool:
        """Every byte as it was sent (touch: its last word)."""
        if words.size != self.words.size:
            return False
        if touch or not words.size:
            return self.last is None or int(words[-1]) == self.last
        return (self.sum + int(words[0])) % 2**64 == int(words.sum(dtype=np.uint64))
