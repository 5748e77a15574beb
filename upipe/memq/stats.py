"""Frozen snapshots of a queue's counters. The counters lie in the segment, so a tool outside can read them."""

from __future__ import annotations

import time

import msgspec


class QueueStats(msgspec.Struct, frozen=True, kw_only=True):
    """One moment of one queue. Counts are frames unless they say bytes; all are totals since creation."""

    capacity: int
    """Bytes of ring."""
    head: int
    """Byte position after the last claimed frame."""
    tail: int
    """Byte position before which everything is finished."""
    next: int
    """Byte position of the next frame to be taken."""
    depth: int
    """Bytes in use: those from tail to head, without the gaps that claims leave."""
    claimed: int
    """Frames that producers claimed, finished writes and not."""
    bytes: int
    """Payload bytes of them."""
    refused: int
    """Frames that a drop policy dropped at the producers' end: newcomers without room, and the newest waiting frame
    when a newcomer took its place (it counts as claimed no more)."""
    passed: int
    """Frames whose place is free again."""
    finished: int
    """... because a consumer finished them."""
    dropped: int
    """... because a policy dropped them."""
    dead: int
    """... because they went to the dead letters."""
    aborted: int
    """... because they never were frames: a write that was not finished."""
    redelivered: int
    """Times a frame was given back."""
    corrupt: int
    """Frames refused for their CRC."""
    taken: int
    """Frames taken, redeliveries not counted."""
    max_depth: int
    """Most bytes in use that were seen."""
    full_waits: int
    """Times a producer slept for room, or to let a consumer that keeps up catch up."""
    empty_waits: int
    """Times a consumer slept for a frame."""
    oldest_ns: int
    """When the oldest unfinished frame was written, ns since 1970; 0 = none."""
    policy: int
    """0 block, 1 drop_oldest, 2 latest."""
    stream: int
    """0 no producer yet, 1 open, 2 all producers closed."""
    max_frames: int
    """Most frames at a time, 0 = no such bound."""
    participants: int
    """Processes that joined. Each counts once, however many handles it has."""
    handles: int
    """Handles that joined, several of one process too; a queue has places for 512 (TooManyParticipants)."""

    @property
    def in_flight(self) -> int:
        """Frames between claim and end."""
        return self.claimed - self.passed

    @property
    def emitted(self) -> int:
        """Frames that were put: claimed without padding, plus those dropped on arrival."""
        return self.claimed - self.aborted + self.refused

    @property
    def lost_to_policy(self) -> int:
        """Frames dropped, waiting or on arrival."""
        return self.dropped + self.refused

    @property
    def balanced(self) -> bool:
        """emitted == finished + dead + dropped + in flight."""
        return self.emitted == self.finished + self.dead + self.lost_to_policy + self.in_flight

    def oldest_age(self) -> float:
        """Seconds since the oldest unfinished frame was written, 0.0 when there is none."""
        return max(0.0, time.time() - self.oldest_ns / 1e9) if self.oldest_ns else 0.0
