"""upipe.cluster.errands: nothing that was handed over is forgotten, also when it is cancelled before it began."""

from __future__ import annotations

import asyncio
import gc
import logging

from upipe.cluster import errands as errands_module
from upipe.cluster.errands import Errands


async def test_an_errand_that_is_cancelled_before_its_first_step_is_closed():
    begun = []

    async def work() -> None:
        begun.append(True)

    errands = Errands()
    errands.run(work())
    await errands.close()
    await asyncio.sleep(0)
    gc.collect()  # a coroutine that was never awaited warns here, and warnings are errors
    assert not begun
    assert len(errands) == 0


async def test_a_failure_is_logged_and_takes_nothing_down(caplog):
    async def work() -> None:
        raise ValueError("no such thing")

    errands = Errands()
    with caplog.at_level(logging.ERROR, "upipe.cluster"):
        task = errands.run(work(), "look")
        assert task is not None
        await task
    assert "look failed" in caplog.text and "no such thing" in caplog.text


async def test_what_goes_on_for_ever_begins_anew_after_a_failure(caplog, monkeypatch):
    monkeypatch.setattr(errands_module, "AGAIN", 0.0)
    begun: list[int] = []

    async def look() -> None:
        begun.append(1)
        if len(begun) < 3:
            raise OSError("out of descriptors")

    errands = Errands()
    task = errands.keep(look, "looking")
    assert task is not None
    await asyncio.wait_for(task, 60)
    assert len(begun) == 3 and caplog.text.count("looking failed, and begins anew") == 2
    await errands.close()


async def test_nothing_is_begun_for_an_owner_that_has_ended():
    errands = Errands()
    await errands.close()
    assert errands.run(asyncio.sleep(60)) is None and len(errands) == 0


async def test_more_than_the_bound_is_dropped_and_counted():
    async def work() -> None:
        await asyncio.sleep(60)

    errands = Errands(most=1)
    assert errands.run(work()) is not None
    assert errands.run(work()) is None
    assert errands.dropped == 1
    await errands.close()
