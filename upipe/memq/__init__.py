"""The memory queue."""

from upipe.memq.queue import Empty, Full, MemQ
from upipe.memq.stats import QueueStats

__all__ = ["Empty", "Full", "MemQ", "QueueStats"]
