"""What bad input gets: a refusal that names everything at once, or an error that tells whose fault it was."""

from __future__ import annotations

import asyncio
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from tests.support import DEADLINE, chain, collect, feed
from upipe import (
    DeclarationError,
    DType,
    EncodeError,
    EndOfStream,
    FrameTooLarge,
    PickleRefused,
    Pipe,
    PipeFailed,
    Processor,
    ProcessorError,
    Settings,
    errors,
    processor,
)

pytestmark = [pytest.mark.system, pytest.mark.slow]


def same(value: Any) -> Any:
    return value


# ------------------------------------------------------------------ declarations


def problems(pipe: Pipe) -> list[str]:
    with pytest.raises(DeclarationError) as raised:
        pipe.validate()
    assert all(text in str(raised.value) for text in raised.value.problems)
    return list(raised.value.problems)


def test_all_problems_of_a_declaration_are_listed_at_once_each_with_its_remedy() -> None:
    lock = threading.Lock()

    def two(a: int, b: int) -> None: ...

    pipe = Pipe("bad")
    a, b = pipe.add(Processor("a", same)), Processor("b", same)
    a.add(b).add(a)
    pipe.add(Processor("twin", same))
    pipe.add(Processor("twin", same))
    pipe.add(Processor("1st", same))
    pipe.add(Processor("empty"))
    pipe.add(Processor("lost", entry="/nowhere/at_all.py"))
    pipe.add(Processor("locked", lambda value: lock))
    pipe.add(Processor("two", two))
    pipe.add(Processor("few", same, workers=0))
    found = problems(pipe)
    for text in (
        "cycle a -> b -> a: a pipe has no cycles; remove one of these edges",
        "processor 'twin': 2 processors have this name; give each its own",
        "processor '1st': invalid name; allowed is a letter, then",
        "processor 'empty': it has no code; give func= or entry=",
        "processor 'lost': its entry script '/nowhere/at_all.py' does not exist; give the path of a file",
        "processor 'locked': its code cannot be shipped to a worker (TypeError: cannot pickle '_thread.lock' object);",
        "processor 'two': func is test_all_problems",
        "processor 'few': workers is 0; give a whole number from 1 to 1024",
    ):
        assert any(one.startswith(text) for one in found), (text, found)
    assert len(found) == 8


def test_a_cycle_without_a_root_and_an_edge_to_itself_are_found() -> None:
    pipe = Pipe("p")
    a = pipe.add(Processor("a", same))
    a.add(a)
    assert problems(pipe) == ["edge a -> a: it leads back to its own processor; remove it, a pipe has no cycles"]


async def test_a_pipe_that_cannot_run_starts_nothing_and_stays_declared() -> None:
    pipe = Pipe("p")
    with pytest.raises(DeclarationError, match="it is empty; add at least one processor"):
        await pipe.start()
    assert pipe.state == "declared"


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda: Processor("a", same, worker=3), "worker"),  # type: ignore[call-arg]
        (lambda: processor(worker=3)(same), "worker"),
        (lambda: Processor("a", same).add(Processor("b", same), polcy="latest"), "polcy"),  # type: ignore[call-arg]
        (lambda: Pipe("p").connect(Processor("a"), Processor("b"), keyed=1), "keyed"),  # type: ignore[call-arg]
        (lambda: Settings(edge_byte=1), "edge_byte"),  # type: ignore[call-arg]
        (lambda: Pipe("p").add(same), "wrap it"),  # type: ignore[arg-type]
        (lambda: Processor("a", same).add(same), "wrap it"),  # type: ignore[arg-type]
    ],
)
def test_an_unknown_option_or_a_bare_function_is_refused_by_name(declare: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        declare()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore'; use one of"),
        ({"resume": True}, "resume is for sources"),
        ({"frame_timeout": -1}, "frame_timeout is -1; give seconds above 0"),
        ({"autoscale": 0}, "autoscale is 0; give a whole number"),
        ({"interpreter": "python"}, "is for scripts; give entry="),
    ],
)
def test_an_option_of_a_wrong_value_is_refused_by_name(options: Any, said: str) -> None:
    pipe = Pipe("p")
    pipe.add(Processor("a", same, **options))
    assert [one for one in problems(pipe) if said in one and one.startswith("processor 'a'")]


# ------------------------------------------------------------------ values


async def test_a_value_that_does_not_fit_its_dtype_is_an_error_at_the_emitter_and_nothing_is_sent() -> None:
    def source() -> None:
        me = Processor("s").blocking.connect()
        for value, dtype in ((-1, DType.U32), (300, DType.U8), ("x", DType.F64), (2**70, DType.I64)):
            with pytest.raises(EncodeError):
                me.emit(value, dtype)
        me.emit(7, DType.U8)

    pipe = chain(Processor("s", source), Processor("e", same))
    assert (await collect(pipe))[0] == [7]
    pipe = chain(Processor("e", same))
    async with asyncio.timeout(DEADLINE), pipe:
        with pytest.raises(EncodeError):
            await pipe.emit(-1, DType.U32)


async def test_a_frame_that_can_never_fit_names_both_sizes_and_nothing_is_lost() -> None:
    pipe = chain(Processor("e", lambda value: len(value)), edge_bytes=64 * 1024)
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        await pipe.emit(b"x" * 1000)
        with pytest.raises(FrameTooLarge, match=r"100,064|100,096|100,032") as raised:
            await pipe.emit(b"x" * 100_000)
        assert "65,536" in str(raised.value)
        await pipe.emit(b"x" * 2000)
        report = await pipe.wait_for_completion()
        assert [one async for one in pipe.results()] == [1000, 2000] and report.balanced


async def test_a_result_that_is_too_large_sends_the_input_to_the_dead_letters() -> None:
    def grow(value: int) -> bytes:
        return bytes(value)

    pipe = Pipe("grow", settings=chain(Processor("x", same)).settings)
    pipe.connect(Processor("grow", grow), Processor("end", lambda value: len(value)), size=64 * 1024)
    found, report = await feed(pipe, [10, 1_000_000, 20])
    (letter,) = pipe.dead_letters()
    assert found == [10, 20] and report.edges[0].dead == 1
    assert (letter.processor, letter.value, letter.error_kind) == ("grow", 1_000_000, "FrameTooLarge")
    assert "1,000,0" in letter.error and "65,536" in letter.error


@pytest.mark.parametrize("where", ["pipe", "consumer", "producer"])
async def test_pickle_is_refused_where_it_is_switched_off(where: str) -> None:
    def make(value: int) -> Any:
        return {1, 2} if value == 1 else value

    refuses = {"allow_pickle": False}
    pipe = chain(
        Processor("make", make, **(refuses if where == "producer" else {})),
        Processor("end", same, **(refuses if where == "consumer" else {})),
        **(refuses if where == "pipe" else {}),
    )
    found, _ = await feed(pipe, [0, 1, 2])
    (letter,) = pipe.dead_letters()
    assert found == [0, 2] and (letter.processor, letter.value, letter.error_kind) == ("make", 1, "PickleRefused")
    pipe = chain(Processor("end", same, allow_pickle=False))
    async with asyncio.timeout(DEADLINE), pipe:
        with pytest.raises(PickleRefused):
            await pipe.emit({1, 2})


class Unreadable:
    """Pickles well and opens badly."""

    def __reduce__(self) -> Any:
        return (int, ("no number",))


async def test_a_frame_that_cannot_be_read_is_buried_at_once_and_its_caller_told() -> None:
    pipe = chain(Processor("a", same), Processor("b", same))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        with pytest.raises(ProcessorError, match="the pickle of a frame does not open"):
            await pipe.call(Unreadable())
        assert await pipe.call(1) == 1
        await pipe.wait_for_completion()
    (letter,) = pipe.dead_letters()
    assert (letter.processor, letter.deliveries, letter.error_kind) == ("a", 1, "FrameError")
    assert letter.frame.dtype == DType.PICKLE
    with pytest.raises(errors.FrameError):
        _ = letter.value


async def test_an_answer_that_cannot_be_read_by_the_caller_raises_there() -> None:
    pipe = chain(Processor("a", lambda value: Unreadable() if value else 5))
    async with asyncio.timeout(DEADLINE), pipe:
        with pytest.raises(errors.FrameError, match="does not open"):
            await pipe.call(1)
        assert await pipe.call(0) == 5


# ------------------------------------------------------------------ code that raises


async def test_a_frame_is_tried_again_up_to_its_limit_then_buried_with_error_frame_and_traceback() -> None:
    def fails(value: Any) -> Any:
        frame = Processor("fails").blocking.connect().frame
        if int(value[0, 0]) == 2 and frame.deliveries < 3:
            raise KeyError("not yet")
        if int(value[0, 0]) == 4:
            raise ValueError("never")
        return int(value[0, 0])

    pipe = chain(Processor("fails", fails, max_deliveries=4))
    found, report = await feed(pipe, [np.full((2, 3), n, np.uint8) for n in range(6)])
    (letter,) = pipe.dead_letters()
    assert found == [0, 1, 2, 3, 5]  # in order: what is given again comes first
    assert (letter.processor, letter.worker, letter.source, letter.deliveries) == ("fails", "fails#0", "", 4)
    assert (letter.error_kind, letter.error) == ("ValueError", "never")
    assert 'raise ValueError("never")' in letter.traceback
    assert letter.frame.dtype == DType.ARRAY and letter.value.tolist() == [[4] * 3] * 2
    assert report.edges[0].redelivered == 2 + 3 and report.processors[0].restarts == 0


async def test_on_error_fail_ends_the_pipe_with_the_remote_traceback() -> None:
    def fails(value: int) -> None:
        raise ValueError("enough")

    pipe = chain(Processor("fails", fails, on_error="fail"))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        await pipe.emit(1)
        with pytest.raises(PipeFailed, match="ValueError: enough") as raised:
            await pipe.wait_for_completion()
    assert 'raise ValueError("enough")' in raised.value.reasons[0] and pipe.state == "failed"


class Weird(Exception):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__(first)
        self.lock = threading.Lock()  # cannot be pickled

    def __str__(self) -> str:
        raise RuntimeError("not even this")


def _deep(left: int) -> None:
    if left:
        _deep(left - 1)
    raise ValueError("x" * 5_000_000 + " the end")


_BAD: dict[str, Any] = {
    "unpicklable": lambda: (_ for _ in ()).throw(Weird(threading.Lock(), 2)),
    "long": lambda: _deep(500),
    "surrogate": lambda: (_ for _ in ()).throw(ValueError("\ud800 half")),
    "exit": lambda: exec("raise SystemExit(0)"),
    "interrupt": lambda: exec("raise KeyboardInterrupt"),
    "cancelled": lambda: exec("import asyncio; raise asyncio.CancelledError"),
    "recursion": lambda: (lambda f: f(f))(lambda f: f(f)),
}


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_whatever_user_code_raises_is_bounded_buried_told_and_survived(asynchronous: bool) -> None:
    def fails(value: str) -> str:
        if value in _BAD:
            _BAD[value]()
        return value

    async def fails_later(value: str) -> str:
        return fails(value)

    pipe = chain(Processor("fails", fails_later if asynchronous else fails, on_error="dead_letter"))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        kinds = {}
        for name in _BAD:
            with pytest.raises(ProcessorError) as raised:
                await pipe.call(name)
            kinds[name] = raised.value.kind
            assert len(str(raised.value)) < 200_000
            pickle.loads(pickle.dumps(raised.value))
        assert await pipe.call("fine") == "fine"
        report = await pipe.wait_for_completion()
    assert kinds == {
        "unpicklable": "Weird", "long": "ValueError", "surrogate": "ValueError", "exit": "SystemExit",
        "interrupt": "KeyboardInterrupt", "cancelled": "CancelledError", "recursion": "RecursionError",
    }
    letters = {one.value: one for one in pipe.dead_letters()}
    assert letters.keys() == _BAD.keys() and report.processors[0].restarts == 0 and report.balanced
    assert "__str__ raised RuntimeError" in letters["unpicklable"].error
    assert "characters left out" in letters["long"].error and letters["long"].error.endswith("the end")


async def test_a_driver_that_raises_buries_the_frame_in_its_hand_and_tells_the_caller() -> None:
    async def work() -> None:
        me = await Processor("work").connect()
        async for value in me:
            if value == 2:
                raise ValueError("two")
            await me.emit(value)

    pipe = chain(Processor("work", work, max_deliveries=2))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        found = await asyncio.gather(*(pipe.call(n) for n in range(5)), return_exceptions=True)
        report = await pipe.wait_for_completion()
    error = found.pop(2)
    assert found == [0, 1, 3, 4] and isinstance(error, ProcessorError) and error.kind == "ValueError"
    (letter,) = pipe.dead_letters()
    assert (letter.value, letter.deliveries, letter.error) == (2, 2, "two") and "raise ValueError" in letter.traceback
    assert report.processors[0].restarts == 2


@pytest.mark.parametrize(("code", "restarts"), [(0, 0), (None, 0), (3, 1)])
async def test_sys_exit_of_a_driver_ends_it_cleanly_or_is_its_death(code: Any, restarts: int) -> None:
    def work() -> None:
        me = Processor("work").blocking.connect()
        if me.epoch == 1:
            me.emit(1)
            raise SystemExit(code)
        me.emit(2)

    found, report = await collect(chain(Processor("work", work)))
    assert found == ([1, 2] if restarts else [1]) and report.processors[0].restarts == restarts


async def test_a_constructor_that_fails_fails_the_start_with_its_traceback() -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no such device")

        def process(self, value: int) -> None: ...

    class Strange:
        def process(self, value: int) -> None: ...

        async def checkpoint(self) -> None: ...

        def restore(self, state: Any) -> None: ...

    with pytest.raises(PipeFailed, match="cannot load its code: OSError: no such device"):
        await collect(chain(Processor("broken", Broken)))
    with pytest.raises(PipeFailed, match=r"checkpoint and restore of class .*Strange must be plain methods"):
        await collect(chain(Processor("strange", Strange)))


async def test_end_of_stream_that_user_code_raises_ends_its_worker_and_its_frame_is_done() -> None:
    def until(value: int) -> int:
        if value == 3:
            raise EndOfStream("enough")
        return value

    found, report = await feed(chain(Processor("until", until)), range(10))
    assert found == [0, 1, 2] and (report.edges[0].finished, report.edges[0].dropped) == (4, 6)


async def test_a_key_that_cannot_be_had_buries_the_input_of_the_emitter() -> None:
    pipe = Pipe("keys", settings=chain(Processor("x", same)).settings)
    pipe.connect(Processor("a", same), Processor("b", same, workers=2), key="user")
    found, _ = await feed(pipe, [{"user": "u", "n": 1}, {"n": 2}])
    assert found == [{"user": "u", "n": 1}]
    assert [(one.processor, one.error_kind, one.value) for one in pipe.dead_letters()] == [("a", "KeyError", {"n": 2})]


async def test_dead_letters_can_be_read_while_the_pipe_runs_and_after_it() -> None:
    def fails(value: int) -> None:
        raise ValueError(str(value))

    pipe = chain(Processor("fails", fails, on_error="dead_letter"))
    async with asyncio.timeout(DEADLINE):
        await pipe.start()
        for number in range(3):
            with pytest.raises(ProcessorError):
                await pipe.call(number)
        assert [one.value for one in pipe.dead_letters()] == [0, 1, 2]
        report = await pipe.wait_for_completion()
    assert [one.value for one in pipe.dead_letters()] == [0, 1, 2] and report.dead_letters == 3
    assert "DeadLetter(fails#0, from the pipe, after 1 deliveries, ValueError: 0" in repr(pipe.dead_letters()[0])


# ------------------------------------------------------------------ the hierarchy


def test_every_error_is_in_the_picture_at_the_top_of_its_file_and_pickles() -> None:
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.UpipeError)]
    assert errors.__doc__ is not None and all(one.__name__ in errors.__doc__ for one in classes)
    made = [
        errors.DeclarationError(["one", "two"], "pipe 'p'"), errors.IllegalTransition("no", (("a", "b"),)),
        errors.ProcessorError("p", "p#0", "ValueError", "x", "trace"), errors.PipeFailed("p", ("r",)),
        errors.NodeRefused("node", 409, "stale_epoch", "A sentence."),
    ]
    for error in made:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
