"""What keeps a declared pipe from running: all of it at once, each problem with its place and its remedy."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from upipe.graph.spec import HOW, KINDS, ON_ERROR, POLICIES, EdgeSpec, PipeSpec, ProcessorSpec
from upipe.settings import KIB, AutoscalePolicy, Place, RestartPolicy, Settings

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
NAME_RULE = "a letter, then up to 62 letters, digits, _ or -"
MOST_WORKERS = 1024
"""Workers of one processor; also the logical producers that one queue can tell apart (memq.layout.PRODUCERS)."""
LEAST_EDGE_BYTES = 64 * KIB
MOST_EDGE_BYTES = 1 << 37
"""The largest ring (memq.layout.MAX_RING)."""
START_METHODS = ("auto", "fork", "exec")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 80

Problems = Iterator[str]


def problems(spec: PipeSpec) -> list[str]:
    """List everything that keeps `spec` from running, in the order of declaration; empty when it is fine."""
    found: list[str] = []
    for check in (_pipe, _settings, _names, _processors, _places, _edges, _duplicate_edges, _cycles):
        found.extend(check(spec))
    return found


# ---------------------------------------------------------------------------------------------------- pipe, settings


def _pipe(spec: PipeSpec) -> Problems:
    where = f"pipe {_show(spec.name)}"
    if not _is_name(spec.name):
        yield f"{where}: invalid name; allowed is {NAME_RULE}"
    if not spec.processors:
        yield f"{where}: it is empty; add at least one processor, pipe.add(Processor(...))"


def _settings(spec: PipeSpec) -> Problems:
    settings, where = spec.settings, "settings"
    yield from _size(f"{where}: edge_bytes", settings.edge_bytes)
    yield from _size(f"{where}: sink_bytes", settings.sink_bytes)
    yield from _whole(f"{where}: dead_letter_bytes", settings.dead_letter_bytes, 0)
    yield from _whole(f"{where}: max_deliveries", settings.max_deliveries, 1)
    yield from _seconds(f"{where}: emit_wait", settings.emit_wait, zero=True)
    for knob in ("stopped_grace", "stop_deadline", "drain_deadline", "start_deadline"):
        yield from _seconds(f"{where}: {knob}", getattr(settings, knob))
    yield from _choice(f"{where}: start_method", settings.start_method, START_METHODS)
    yield from _restart(where, settings.restart)
    yield from _autoscale_policy(where, settings)


def _restart(where: str, policy: RestartPolicy) -> Problems:
    yield from _whole(f"{where}: restart.limit", policy.limit, 0)
    yield from _seconds(f"{where}: restart.window", policy.window)
    yield from _seconds(f"{where}: restart.backoff", policy.backoff, zero=True)
    yield from _seconds(f"{where}: restart.backoff_max", policy.backoff_max, zero=True)


def _autoscale_policy(where: str, settings: Settings) -> Problems:
    policy: AutoscalePolicy = settings.autoscale
    if not (_is_number(policy.up_depth) and 0 < policy.up_depth <= 1):
        yield f"{where}: autoscale.up_depth is {_show(policy.up_depth)}; give a share above 0, at most 1"
    for knob in ("up_age", "down_idle", "interval"):
        yield from _seconds(f"{where}: autoscale.{knob}", getattr(policy, knob))


# -------------------------------------------------------------------------------------------------------- processors


def _names(spec: PipeSpec) -> Problems:
    for one in spec.processors:
        if not _is_name(one.name):
            yield f"processor {_show(one.name)}: invalid name; allowed is {NAME_RULE}"
    for text, count in Counter(repr(one.name) for one in spec.processors).items():
        if count > 1:
            yield f"processor {_cut(text)}: {count} processors have this name; give each its own"


def _processors(spec: PipeSpec) -> Problems:
    incoming: dict[str, list[EdgeSpec]] = defaultdict(list)
    for edge in spec.edges:
        incoming[repr(edge.target)].append(edge)
    for one in spec.processors:
        edges = incoming[repr(one.name)]
        where = f"processor {_show(one.name)}"
        yield from _code(where, one)
        yield from _workers(where, one, edges)
        yield from _choice(f"{where}: on_error", one.on_error, ON_ERROR)
        yield from _whole(f"{where}: max_deliveries", one.max_deliveries, 1)
        yield from _whole(f"{where}: checkpoint_every", one.checkpoint_every, 1)
        if one.frame_timeout is not None:
            yield from _seconds(f"{where}: frame_timeout", one.frame_timeout)
        yield from _restart(where, one.restart)
        yield from _source(where, one, edges)


def _code(where: str, one: ProcessorSpec) -> Problems:
    if not one.code and not one.entry:
        yield f"{where}: it has no code; give func= or entry="
        return
    if one.kind not in KINDS:
        yield from _choice(f"{where}: kind", one.kind, KINDS)
    elif one.kind == "entry" and not one.entry:
        yield f"{where}: kind is 'entry' without a script; give entry=, the path of the script"
    elif one.kind != "entry" and one.entry:
        yield f"{where}: it has a function and entry={_show(one.entry)}; keep one of them"
    elif one.kind != "entry" and one.interpreter:
        yield f"{where}: interpreter={_show(one.interpreter)} is for scripts; give entry= or leave it out"
    if one.code and not _matches(_SHA256, one.code):
        yield f"{where}: code is {_show(one.code)}; give the SHA-256 of the code, 64 hex digits in lower case"


def _workers(where: str, one: ProcessorSpec, edges: list[EdgeSpec]) -> Problems:
    yield from _whole(f"{where}: workers", one.workers, 1, MOST_WORKERS)
    if one.autoscale is None:
        return
    wrong = list(_whole(f"{where}: autoscale", one.autoscale, 1, MOST_WORKERS))
    yield from wrong
    if not wrong and _is_whole(one.workers) and one.autoscale < one.workers:
        yield f"{where}: autoscale={one.autoscale} is below workers={one.workers}; it is the most workers, raise it"
    if one.kind == "source":
        yield f"{where}: autoscale follows the input and a source has none; use workers= alone"
    for edge in edges:
        if edge.keyed:
            yield (
                f"{where}: autoscale does not go with the keyed edge {_label(edge)}, whose partitions are fixed; "
                "use workers= alone, or an edge without key"
            )


def _source(where: str, one: ProcessorSpec, edges: list[EdgeSpec]) -> Problems:
    if one.kind != "source":
        if one.resume:
            yield f"{where}: resume is for sources (generators without parameters); leave it out"
        return
    if edges:
        feeding = ", ".join(dict.fromkeys(_show(edge.source) for edge in edges))
        yield (
            f"{where}: it is a source (a generator without parameters) but has input from {feeding}; "
            "give the function one parameter, or remove the edge"
        )


# -------------------------------------------------------------------------------------------------- places (a cluster)


def _places(spec: PipeSpec) -> Problems:
    known = set(_successors(spec))
    wrong = False
    for one in spec.processors:
        where = f"processor {_show(one.name)}"
        yield from _resources(where, one)
        found = list(_place(where, one, known))
        wrong = wrong or bool(found)
        yield from found
    if not wrong:
        yield from _contradictions(spec)


def _resources(where: str, one: ProcessorSpec) -> Problems:
    for name, amount in one.resources:
        if not _is_name(name):
            yield f"{where}: resource {_show(name)}: invalid name; allowed is {NAME_RULE}"
        elif not (_is_number(amount) and 0 <= amount < float("inf")):
            yield f"{where}: resource {name!r} is {_show(amount)}; give an amount of at least 0"


def _place(where: str, one: ProcessorSpec, known: set[str]) -> Problems:
    place: Place = one.place
    if not isinstance(place, Place):
        yield f"{where}: place is {_show(place)}; give Place(...)"
        return
    fields = {name: getattr(place, name) for name in ("labels", "hosts", "near", "apart")}
    for name, value in fields.items():
        if not isinstance(value, (tuple, list)) or not all(isinstance(text, str) and text for text in value):
            yield f"{where}: place.{name} is {_show(value)}; give a tuple of texts, such as {name}=('x',)"
    yield from _choice(f"{where}: place.how", place.how, HOW)
    for name in ("near", "apart"):
        for other in fields[name] if isinstance(fields[name], (tuple, list)) else ():
            if not _in(other, known):
                yield f"{where}: place.{name}: the pipe has no processor {_show(other)}; add it, or correct the name"


def _contradictions(spec: PipeSpec) -> Problems:
    """Places that no cluster can give."""
    by_name = {one.name: one for one in spec.processors if _is_text(one.name)}
    for one in by_name.values():
        where = f"processor {_show(one.name)}"
        keys: dict[str, str] = {}
        for label in one.place.labels:
            key, told, value = label.partition("=")
            if told and keys.setdefault(key, value) != value:
                yield f"{where}: place.labels asks for {key}={keys[key]} and {key}={value} of one node; keep one"
        for name in one.place.near:
            other = by_name[name]
            if name == one.name:
                yield f"{where}: place.near names itself; leave it out, or use how='pack'"
            elif name in one.place.apart or one.name in other.place.apart:
                yield f"{where}: it shall run near {name!r} and apart from it; remove one of them"
            elif one.place.hosts and other.place.hosts and not set(one.place.hosts) & set(other.place.hosts):
                yield f"{where}: it shall run near {name!r}, but their place.hosts have no node in common; change one"
    for path in _circles({name: [n for n in one.place.near if n != name] for name, one in by_name.items()}):
        yield f"place.near goes in a circle, {' -> '.join(path)}; remove one of them (who leads names nobody)"


# ------------------------------------------------------------------------------------------------------------- edges


def _edges(spec: PipeSpec) -> Problems:
    known = set(_successors(spec))
    for edge in spec.edges:
        where = f"edge {_label(edge)}"
        for name in dict.fromkeys(_show(end) for end in (edge.source, edge.target) if not _in(end, known)):
            yield f"{where}: the pipe has no processor {name}; add it, or correct the name"
        if edge.size is not None:
            yield from _size(f"{where}: size", edge.size)
        yield from _choice(f"{where}: policy", edge.policy, POLICIES)
        if edge.keyed and edge.policy in ("drop_oldest", "latest"):
            yield f"{where}: policy {edge.policy!r} would break the order per key; use policy='block' or drop the key"


def _duplicate_edges(spec: PipeSpec) -> Problems:
    for label, count in Counter(_label(edge) for edge in spec.edges).items():
        if count > 1:
            yield f"edge {label}: declared {count} times; keep one"


def _cycles(spec: PipeSpec) -> Problems:
    for path in cycles(spec):
        if len(path) == 2:
            yield f"edge {' -> '.join(path)}: it leads back to its own processor; remove it, a pipe has no cycles"
            continue
        yield f"cycle {' -> '.join(path)}: a pipe has no cycles; remove one of these edges"


def cycles(spec: PipeSpec) -> list[tuple[str, ...]]:
    """Find the cycles of `spec`, each as a closed path such as ``("a", "b", "a")``.

    There is one path for every edge that leads back in a depth-first walk in order of declaration: not every cycle,
    of which there may be exponentially many, but none is left once the last edge of each path is gone.
    """
    return _circles(_successors(spec))


def _circles(after: dict[str, list[str]]) -> list[tuple[str, ...]]:
    done: set[str] = set()
    found: list[tuple[str, ...]] = []
    for start in after:
        if start not in done:
            _walk(start, after, done, found)
    return found


def _walk(start: str, after: dict[str, list[str]], done: set[str], found: list[tuple[str, ...]]) -> None:
    # By hand and not by recursion: a chain may be longer than Python's stack.
    path = {start: 0}
    stack = [(start, iter(after[start]))]
    while stack:
        name, rest = stack[-1]
        step = next(rest, None)
        if step is None:
            stack.pop()
            del path[name]
            done.add(name)
        elif step in path:
            found.append((*list(path)[path[step] :], step))
        elif step not in done:
            path[step] = len(path)
            stack.append((step, iter(after[step])))


def _successors(spec: PipeSpec) -> dict[str, list[str]]:
    """Each processor with those its edges lead to; names that are no strings are left out, other checks tell them."""
    after: dict[str, list[str]] = {one.name: [] for one in spec.processors if _is_text(one.name)}
    known = set(after)
    pairs = [(edge.source, edge.target) for edge in spec.edges if _in(edge.source, known) and _in(edge.target, known)]
    for source, target in dict.fromkeys(pairs):
        after[source].append(target)
    return after


# ------------------------------------------------------------------------------------------------------ single values


def _choice(what: str, value: object, allowed: tuple[str, ...]) -> Problems:
    if value not in allowed:
        yield f"{what} is {_show(value)}; use one of {', '.join(map(repr, allowed))}"


def _whole(what: str, value: object, least: int, most: int | None = None) -> Problems:
    if not _is_whole(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        yield f"{what} is {_show(value)}; give a whole number {span}"


def _size(what: str, value: object) -> Problems:
    yield from _whole(f"{what} (bytes)", value, LEAST_EDGE_BYTES, MOST_EDGE_BYTES)


def _seconds(what: str, value: object, zero: bool = False) -> Problems:
    fine = _is_number(value) and (value > 0 or (zero and value == 0))  # type: ignore[operator]
    if not fine:
        yield f"{what} is {_show(value)}; give seconds {'of at least' if zero else 'above'} 0"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_name(value: object) -> bool:
    return _matches(NAME, value)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _in(value: object, names: set[str]) -> bool:
    return isinstance(value, str) and value in names


def _label(edge: EdgeSpec) -> str:
    ends = (end if _is_name(end) else _show(end) for end in (edge.source, edge.target))
    return " -> ".join(ends)


def _show(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    """Keep a message readable whatever was declared."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
