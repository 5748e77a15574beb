"""Every problem of a declared pipe, and (below) what kind of processor a callable makes."""

from __future__ import annotations

import abc
import functools
import itertools
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upipe.errors import DeclarationError
from upipe.graph.inspect import inspect_func
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.graph.validate import MOST_EDGE_BYTES, MOST_WORKERS, cycles, problems
from upipe.settings import KIB, AutoscalePolicy, Place, RestartPolicy, Settings

CODE = "0123456789abcdef" * 4
GOOD = ProcessorSpec("a", "map", CODE)


def but(**changes: Any) -> ProcessorSpec:
    return msgspec.structs.replace(GOOD, **changes)


def pipe(*parts: ProcessorSpec | EdgeSpec, name: Any = "p", **knobs: Any) -> PipeSpec:
    processors = tuple(part for part in parts if isinstance(part, ProcessorSpec))
    edges = tuple(part for part in parts if isinstance(part, EdgeSpec))
    return PipeSpec(name, processors, edges, Settings(**knobs))


def pair(edge: EdgeSpec, *more: EdgeSpec, **changes: Any) -> PipeSpec:
    """Processors a and b; `changes` are b's."""
    return pipe(GOOD, but(**{"name": "b", **changes}), edge, *more)


AB = EdgeSpec("a", "b")
CASES: dict[str, tuple[PipeSpec, str]] = {
    "empty": (pipe(), "pipe 'p': it is empty; add at least one processor"),
    "pipe name": (pipe(GOOD, name="a/b"), "pipe 'a/b': invalid name; allowed is a letter, then up to 62 letters"),
    "name with newline": (pipe(but(name="a\n")), r"processor 'a\n': invalid name"),
    "name begins with digit": (pipe(but(name="1a")), "processor '1a': invalid name"),
    "name too long": (pipe(but(name="a" * 64)), "invalid name"),
    "name not ascii": (pipe(but(name="ä")), "processor 'ä': invalid name"),
    "name no string": (pipe(but(name=None)), "processor None: invalid name"),
    "name unhashable": (pipe(but(name=[])), "processor []: invalid name"),
    "name endless": (pipe(but(name="a" * 10**6)), "...: invalid name"),
    "duplicate name": (pipe(GOOD, GOOD, GOOD), "processor 'a': 3 processors have this name; give each its own"),
    "no code": (pipe(but(code="")), "processor 'a': it has no code; give func= or entry="),
    "code": (pipe(but(code="abc")), "processor 'a': code is 'abc'; give the SHA-256"),
    "kind": (pipe(but(kind="magic")), "processor 'a': kind is 'magic'; use one of 'driver', 'map'"),
    "entry without script": (pipe(but(kind="entry")), "processor 'a': kind is 'entry' without a script"),
    "function and entry": (pipe(but(entry="x.py")), "processor 'a': it has a function and entry='x.py'; keep one"),
    "interpreter": (pipe(but(interpreter="python3")), "processor 'a': interpreter='python3' is for scripts"),
    "no workers": (pipe(but(workers=0)), "processor 'a': workers is 0; give a whole number from 1 to 1024"),
    "many workers": (pipe(but(workers=MOST_WORKERS + 1)), "processor 'a': workers is 1025"),
    "half a worker": (pipe(but(workers=1.5)), "processor 'a': workers is 1.5"),
    "workers true": (pipe(but(workers=True)), "processor 'a': workers is True"),
    "autoscale below": (pipe(but(workers=4, autoscale=2)), "processor 'a': autoscale=2 is below workers=4"),
    "autoscale above": (pipe(but(autoscale=2000)), "processor 'a': autoscale is 2000"),
    "autoscale text": (pipe(but(autoscale="max")), "processor 'a': autoscale is 'max'"),
    "autoscale source": (pipe(but(kind="source", autoscale=2)), "processor 'a': autoscale follows the input"),
    "autoscale keyed": (
        pair(EdgeSpec("a", "b", keyed=True), autoscale=2),
        "processor 'b': autoscale does not go with the keyed edge a -> b, whose partitions are fixed",
    ),
    "on_error": (pipe(but(on_error="ignore")), "processor 'a': on_error is 'ignore'; use one of 'retry'"),
    "max_deliveries": (pipe(but(max_deliveries=0)), "processor 'a': max_deliveries is 0"),
    "checkpoint_every": (pipe(but(kind="source", resume=True, checkpoint_every=0)), "checkpoint_every is 0"),
    "frame_timeout": (pipe(but(frame_timeout=0)), "processor 'a': frame_timeout is 0; give seconds above 0"),
    "resource name": (pipe(but(resources=(("a b", 1),))), "processor 'a': resource 'a b': invalid name"),
    "resource below 0": (pipe(but(resources=(("gpu", -1),))), "processor 'a': resource 'gpu' is -1; give an amount"),
    "resource nan": (pipe(but(resources=(("gpu", math.nan),))), "resource 'gpu' is nan; give an amount of at least 0"),
    "no place": (pipe(but(place="here")), "processor 'a': place is 'here'; give Place(...)"),
    "near text": (pipe(but(place=Place(hosts="host"))), "place.hosts is 'host'; give a tuple of texts"),  # type: ignore[arg-type]
    "label": (pipe(but(place=Place(labels=("",)))), "processor 'a': place.labels is ('',); give a tuple of texts"),
    "how": (pipe(but(place=Place(how="well"))), "processor 'a': place.how is 'well'; use one of 'pack', 'spread'"),
    "near nobody": (pipe(but(place=Place(near=("x",)))), "place.near: the pipe has no processor 'x'; add it"),
    "apart nobody": (pipe(but(place=Place(apart=("x",)))), "place.apart: the pipe has no processor 'x'; add it"),
    "near itself": (pipe(but(place=Place(near=("a",)))), "place.near names itself"),
    "two labels": (pipe(but(place=Place(labels=("z=1", "z=2")))), "asks for z=1 and z=2 of one node; keep one"),
    "near and apart": (
        pair(EdgeSpec("a", "b"), place=Place(near=("a",), apart=("a",))),
        "processor 'b': it shall run near 'a' and apart from it",
    ),
    "near, pinned elsewhere": (
        pipe(but(place=Place(hosts=("n1",))), but(name="b", place=Place(near=("a",), hosts=("n2",)))),
        "processor 'b': it shall run near 'a', but their place.hosts have no node in common",
    ),
    "near in a circle": (
        pipe(but(place=Place(near=("b",))), but(name="b", place=Place(near=("a",)))),
        "place.near goes in a circle, a -> b -> a; remove one",
    ),
    "frame_timeout nan": (pipe(but(frame_timeout=math.nan)), "processor 'a': frame_timeout is nan"),
    "restart": (pipe(but(restart=RestartPolicy(limit=-1))), "processor 'a': restart.limit is -1"),
    "resume": (pipe(but(resume=True)), "processor 'a': resume is for sources"),
    "source with input": (
        pair(AB, kind="source"),
        "processor 'b': it is a source (a generator without parameters) but",
    ),
    "unknown target": (pipe(GOOD, AB), "edge a -> b: the pipe has no processor 'b'; add it"),
    "unknown source": (pipe(GOOD, EdgeSpec("b", "a")), "edge b -> a: the pipe has no processor 'b'"),
    "edge to nothing": (pipe(GOOD, EdgeSpec("a", [])), "edge a -> []: the pipe has no processor []"),  # type: ignore[arg-type]
    "self edge": (pipe(GOOD, EdgeSpec("a", "a")), "edge a -> a: it leads back to its own processor"),
    "duplicate edge": (pair(AB, EdgeSpec("a", "b", size=2**20)), "edge a -> b: declared 2 times; keep one"),
    "cycle": (pair(AB, EdgeSpec("b", "a")), "cycle a -> b -> a: a pipe has no cycles; remove one of these edges"),
    "policy": (pair(EdgeSpec("a", "b", policy="drop")), "edge a -> b: policy is 'drop'; use one of 'block'"),
    "small": (
        pair(EdgeSpec("a", "b", size=64 * KIB - 1)),
        "edge a -> b: size (bytes) is 65535; give a whole number from",
    ),
    "large": (pair(EdgeSpec("a", "b", size=MOST_EDGE_BYTES + 1)), "edge a -> b: size (bytes) is 137438953473"),
    "size text": (pair(EdgeSpec("a", "b", size="1M")), "edge a -> b: size (bytes) is '1M'"),  # type: ignore[arg-type]
    "keyed drop": (pair(EdgeSpec("a", "b", policy="latest", keyed=True)), "edge a -> b: policy 'latest' would break"),
    "edge_bytes": (pipe(GOOD, edge_bytes=1), "settings: edge_bytes (bytes) is 1"),
    "sink_bytes": (pipe(GOOD, sink_bytes=1), "settings: sink_bytes (bytes) is 1"),
    "dead_letter_bytes": (pipe(GOOD, dead_letter_bytes=-1), "settings: dead_letter_bytes is -1"),
    "deliveries": (pipe(GOOD, max_deliveries=0), "settings: max_deliveries is 0"),
    "emit_wait": (pipe(GOOD, emit_wait=-1), "settings: emit_wait is -1; give seconds of at least 0"),
    "deadline": (pipe(GOOD, stop_deadline="soon"), "settings: stop_deadline is 'soon'; give seconds above 0"),
    "start_method": (pipe(GOOD, start_method="spawn"), "settings: start_method is 'spawn'; use one of 'auto'"),
    "restart window": (pipe(GOOD, restart=RestartPolicy(window=0)), "settings: restart.window is 0"),
    "up_depth": (pipe(GOOD, autoscale=AutoscalePolicy(up_depth=50)), "settings: autoscale.up_depth is 50"),
    "up_age": (pipe(GOOD, autoscale=AutoscalePolicy(up_age=0)), "settings: autoscale.up_age is 0"),
}


@pytest.mark.parametrize(("spec", "text"), CASES.values(), ids=CASES)
def test_each_problem_is_the_only_one_and_says_where(spec: PipeSpec, text: str) -> None:
    found = problems(spec)
    assert len(found) == 1, found
    assert text in found[0]
    assert len(found[0]) < 400


GOOD_PIPES: dict[str, PipeSpec] = {
    "one": pipe(GOOD),
    "longest name": pipe(but(name="a" * 63)),
    "every sign": pipe(but(name="Az09_-")),
    "entry": pipe(but(kind="entry", code="", entry="x.py", interpreter="/usr/bin/python3")),
    "shipped entry": pipe(but(kind="entry", entry="x.py")),
    "source": pipe(but(kind="source", resume=True, workers=3)),
    "keyed": pair(EdgeSpec("a", "b", size=64 * KIB, keyed=True), workers=8),
    "autoscale": pair(EdgeSpec("a", "b", policy="latest", size=MOST_EDGE_BYTES), workers=2, autoscale=2),
    "timeout": pipe(but(frame_timeout=0.5)),
    "place": pipe(
        but(resources=(("cpu", 0), ("fpga", 2.5)), place=Place(("z=a", "z=a", "ssd"), ("n1", "n2"), how="spread")),
        but(name="b", place=Place(near=("a",), apart=("b",))),
    ),
    "two roots, two ends": pipe(
        *(but(name=name) for name in "abxcd"),
        *(EdgeSpec(*ends) for ends in (("a", "x"), ("b", "x"), ("x", "c"), ("x", "d"))),
    ),
    "diamond": pipe(
        *(but(name=name) for name in "abcd"), *(EdgeSpec(*ends) for ends in ("ab", "ac", "bd", "cd", "ad"))
    ),
}


@pytest.mark.parametrize("spec", GOOD_PIPES.values(), ids=GOOD_PIPES)
def test_good_pipes_have_no_problems(spec: PipeSpec) -> None:
    assert problems(spec) == []


def test_all_problems_come_at_once() -> None:
    spec = pipe(
        but(workers=0, on_error="x"),
        but(name="b", code=""),
        but(name="no space allowed"),
        AB,
        EdgeSpec("b", "a", size=1, policy="x"),
        EdgeSpec("a", "nobody"),
        name="",
        edge_bytes=0,
    )
    found = "\n".join(problems(spec))
    for text in (
        "pipe ''",
        "edge_bytes",
        "workers",
        "on_error",
        "no code",
        "no space",
        "size",
        "policy",
        "'nobody'",
        "cycle",
    ):
        assert text in found


def test_a_long_chain_and_a_dense_graph_are_walked_without_recursion() -> None:
    names = [f"n{index}" for index in range(3000)]
    chain = [EdgeSpec(*ends) for ends in itertools.pairwise(names)]
    ring = PipeSpec("p", tuple(but(name=name) for name in names), (*chain, EdgeSpec(names[-1], names[0])))
    assert cycles(ring) == [(*names, names[0])]


def test_several_cycles_are_all_told() -> None:
    edges = [EdgeSpec(*ends) for ends in ("ab", "ba", "bc", "ca", "de", "ed", "xx")]
    found = cycles(pipe(*(but(name=name) for name in "abcdex"), *edges))
    assert found == [("a", "b", "a"), ("a", "b", "c", "a"), ("d", "e", "d"), ("x", "x")]


@settings(max_examples=60)
@given(ends=st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("abcdef")), max_size=20))
def test_cycles_are_closed_paths_of_edges_and_cutting_their_ends_leaves_none(ends: list[tuple[str, str]]) -> None:
    everyone = [but(name=name) for name in "abcdef"]
    found = cycles(pipe(*everyone, *(EdgeSpec(*one) for one in ends)))
    for path in found:
        assert path[0] == path[-1]
        assert len(set(path)) == len(path) - 1
        assert set(itertools.pairwise(path)) <= set(ends)
    cut = set(ends) - {path[-2:] for path in found}
    assert cycles(pipe(*everyone, *(EdgeSpec(*one) for one in sorted(cut)))) == []


# ------------------------------------------------------------------------------------------------------ inspect_func


class Plain:
    def process(self, value: int) -> int:
        return value


class Configured:
    def __init__(self, *, config: Any = None) -> None:
        self.config = config

    async def process(self, value: int, extra: int = 0) -> AsyncIterator[int]:
        yield value + extra


class Static:
    @staticmethod
    def process(value: int) -> int:
        return value


class Native(dict):  # type: ignore[type-arg]
    """Its constructor is written in C and has no signature."""

    def process(self, value: int) -> int:
        return value


class Needy:
    def __init__(self, model: str) -> None:
        self.model = model

    def process(self, value: int) -> int:
        return value


class Lacking:
    def run(self) -> None: ...


class NoValue:
    def process(self) -> None: ...


class TwoValues:
    def process(self, left: int, right: int) -> None: ...


class ConfigInProcess:
    def process(self, value: int, config: Any) -> None: ...


class Attribute:
    process = 3


class Abstract(abc.ABC):
    @abc.abstractmethod
    def process(self, value: int) -> int: ...


class Caller:
    def __call__(self, value: int) -> int:
        return value

    def source(self) -> Iterator[int]:
        yield 1

    def two(self, left: int, right: int) -> int:
        return left + right

    @classmethod
    def made(cls, value: int) -> int:
        return value


class CallerSource:
    async def __call__(self, *, config: Any = None) -> AsyncIterator[int]:
        yield 1


def driver() -> None: ...
async def async_driver() -> None: ...
def configured_driver(*, config: Any) -> None: ...
def optional(value: int = 1) -> None: ...
def keywords(**rest: Any) -> None: ...
def source() -> Iterator[int]:
    yield 1


async def async_source() -> AsyncIterator[int]:
    yield 1


def configured_source(config: Any = None) -> Iterator[int]:
    yield config


def mapped(value: int) -> int:
    return value


async def async_mapped(value: int) -> int:
    return value


def flat(value: int) -> Iterator[int]:
    yield value


async def async_flat(value: int, *, config: Any = None) -> AsyncIterator[int]:
    yield value


def configured(value: int, config: Any) -> int:
    return value


def with_default(value: int, factor: int = 2, **rest: Any) -> int:
    return value * factor


def two(left: int, right: int) -> int:
    return left + right


def starred(*values: int) -> None: ...
def config_only(config: Any) -> None: ...
def config_first(config: Any, value: int) -> None: ...
def config_unnamed(value: int, config: Any, /) -> None: ...
def keyword_needed(value: int, *, model: str) -> None: ...


def passing(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return inner


def opaque(func: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: func(*args, **kwargs)


ACCEPTED: dict[str, tuple[object, str, bool]] = {
    "driver": (driver, "driver", False),
    "async driver": (async_driver, "driver", False),
    "driver with config": (configured_driver, "driver", True),
    "only defaults": (optional, "driver", False),
    "only keywords": (keywords, "driver", False),
    "source": (source, "source", False),
    "async source": (async_source, "source", False),
    "source with config": (configured_source, "source", True),
    "decorated source": (passing(source), "source", False),
    "cached source": (functools.cache(source), "source", False),
    "bound source": (Caller().source, "source", False),
    "source object": (CallerSource(), "source", True),
    "partial source": (functools.partial(flat, 1), "source", False),
    "map": (mapped, "map", False),
    "async map": (async_mapped, "map", False),
    "generator": (flat, "map", False),
    "async generator": (async_flat, "map", True),
    "config needed": (configured, "map", True),
    "defaults": (with_default, "map", False),
    "lambda": (lambda value: value, "map", False),
    "builtin": (len, "map", False),
    "partial": (functools.partial(two, 1), "map", False),
    "partial keyword": (functools.partial(keyword_needed, model="m"), "map", False),
    "partial of partial": (functools.partial(functools.partial(two), right=1), "map", False),
    "decorated": (passing(configured), "map", True),
    "bound method": (Static().process, "map", False),
    "class method": (Caller.made, "map", False),
    "callable object": (Caller(), "map", False),
    "class": (Plain, "class", False),
    "class with config": (Configured, "class", True),
    "static process": (Static, "class", False),
    "native constructor": (Native, "class", False),
    "partial class": (functools.partial(Needy, "m"), "class", False),
}


@pytest.mark.parametrize(("func", "kind", "takes_config"), ACCEPTED.values(), ids=ACCEPTED)
def test_inspect_accepts(func: object, kind: str, takes_config: bool) -> None:
    assert inspect_func("p", func) == (kind, takes_config)


REFUSED: dict[str, tuple[object, str]] = {
    "nothing": (None, "missing; give func, or entry for a script"),
    "script": ("x.py", "a string; for a script use entry="),
    "number": (3, "of type int, which cannot be called"),
    "called generator": (source(), "a generator, the result of a call; pass the function itself"),
    "instance": (Plain(), "an instance of Plain; pass the class itself"),
    "two": (two, "two, which needs 2 parameters (left, right), where one value comes"),
    "bound two": (Caller().two, "Caller.two, which needs 2 parameters (left, right)"),
    "star": (starred, "starred, which takes *args"),
    "opaque decorator": (opaque(mapped), "or use functools.wraps"),
    "keyword": (keyword_needed, "keyword_needed, which needs a keyword"),
    "config only": (config_only, "config_only, which has config as its first parameter"),
    "config first": (config_first, "config_first, which has config as its first parameter"),
    "config unnamed": (config_unnamed, "needs 2 parameters (value, config)"),
    "unreadable": (max, "max, which has parameters that cannot be read; wrap it"),
    "partial too full": (
        functools.partial(mapped, 1, 2),  # type: ignore[call-arg]
        "mapped, which has parameters that cannot be read",
    ),
    "no process": (Lacking, "class Lacking, which has no method process(self, value)"),
    "builtin class": (int, "class int, which has no method process"),
    "process no method": (Attribute, "class Attribute, which has no method process"),
    "process no value": (NoValue, "class NoValue, whose process takes no value"),
    "process two": (TwoValues, "class TwoValues, whose process needs 2 parameters (left, right)"),
    "process config": (ConfigInProcess, "class ConfigInProcess, whose process needs 2 parameters (value, config)"),
    "abstract": (Abstract, "class Abstract, which is abstract: process not implemented"),
    "constructor": (Needy, "class Needy, whose constructor needs model; bind it with functools.partial"),
}


@pytest.mark.parametrize(("func", "text"), REFUSED.values(), ids=REFUSED)
def test_inspect_refuses_with_one_problem_that_says_what_and_what_instead(func: object, text: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        inspect_func("resize", func)
    (problem,) = caught.value.problems
    assert problem.startswith("processor 'resize': func is ")
    assert text in problem
    assert "Accepted: a function without parameters" in problem


def test_inspect_names_objects_without_a_name_by_their_class() -> None:
    class Odd:
        def __call__(self, left: int, right: int) -> None: ...

    with pytest.raises(DeclarationError, match=r"an object of class .*Odd, which needs 2 parameters"):
        inspect_func("p", Odd())
