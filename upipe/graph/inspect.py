"""What kind of processor a Python callable makes, judged by its signature alone; it is never called.

    def f()                     driver      def f(): yield              source
    def f(value)                map         class C: process(self, v)   class

Plain or async, generator or not; a function, bound method, functools.partial or object with ``__call__``. The keyword
``config`` goes to whatever names it (a class: in its constructor). Every other parameter needs a default.
"""

from __future__ import annotations

import functools
import inspect
from inspect import Parameter
from typing import Any

from upipe.errors import DeclarationError
from upipe.graph.spec import Kind

ACCEPTED = (
    "a function without parameters (it drives itself, or is a generator and thus a source), a function of one value, "
    "or a class with process(self, value); functions and constructors may also take the keyword config"
)
_REMEDY = "bind it with functools.partial or give it a default"


class _Refused(Exception):
    """What was found instead of something acceptable, as the end of the sentence "func is ..."."""


def inspect_func(name: str, func: object) -> tuple[Kind, bool]:
    """Decide how a worker of processor `name` runs `func`.

    What ``functools.wraps`` decorates counts as what it wraps, also for whether it is a generator: a worker must be
    ready for a "source" whose decorator returned something else.

    Returns:
        The kind, and whether to call it (a class: construct it) with the keyword ``config``.

    Raises:
        DeclarationError: with one problem that says what was found and what is accepted.
    """
    try:
        return _inspect(func)
    except _Refused as refused:
        problem = f"processor {name!r}: func is {refused}. Accepted: {ACCEPTED}"
        raise DeclarationError([problem], f"processor {name!r}") from None


def _inspect(func: object) -> tuple[Kind, bool]:
    bare = _bare(func)
    if inspect.isclass(bare):
        return "class", _inspect_class(func, bare)
    if not callable(func):
        raise _Refused(_describe_uncallable(func))
    title = f"{_name(bare)}, which"
    parameters = _parameters(func, title)
    config = _config(parameters)
    if config and config is parameters[0] and _positional(config) and (len(parameters) > 1 or _required(config)):
        raise _Refused(f"{title} has config as its first parameter; put the value first, or write def f(*, config)")
    if _takes_value([one for one in parameters if one is not config], title):
        return "map", config is not None
    return ("source" if _yields(bare) else "driver"), config is not None


def _inspect_class(factory: Any, cls: Any) -> bool:
    """Check a class; `factory` is the class itself or a partial of it. Returns whether it takes config."""
    title = f"class {cls.__qualname__}"
    process: Any = getattr(cls, "process", None)
    if not callable(process):
        raise _Refused(f"{title}, which has no method process(self, value)")
    if inspect.isabstract(cls):
        raise _Refused(f"{title}, which is abstract: {', '.join(sorted(cls.__abstractmethods__))} not implemented")
    if not isinstance(inspect.getattr_static(cls, "process"), (staticmethod, classmethod)):
        process = functools.partial(process, None)  # stands for the binding to an instance that is not made yet
    title = f"{title}, whose process"
    if not _takes_value(_parameters(process, title), title):
        raise _Refused(f"{title} takes no value; write process(self, value)")
    return _constructor_takes_config(factory, f"class {cls.__qualname__}, whose constructor")


def _constructor_takes_config(factory: Any, title: str) -> bool:
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # written in C: it will be called without arguments
        return False
    config = _config(parameters)
    needed = [one.name for one in parameters if _required(one) and one is not config]
    if needed:
        raise _Refused(f"{title} needs {', '.join(needed)}; {_REMEDY}")
    return config is not None


def _parameters(func: Any, title: str) -> list[Parameter]:
    try:
        return list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        raise _Refused(f"{title} has parameters that cannot be read; wrap it: def f(value): return ...") from None


def _takes_value(parameters: list[Parameter], title: str) -> bool:
    """Whether exactly one parameter needs a value (True) or none does (False); anything else is refused."""
    required = [one for one in parameters if _required(one)]
    names = ", ".join(one.name for one in required)
    if any(one.kind is Parameter.KEYWORD_ONLY for one in required):
        raise _Refused(f"{title} needs a keyword (of {names}) that nobody gives; {_REMEDY}")
    if len(required) > 1:
        raise _Refused(f"{title} needs {len(required)} parameters ({names}), where one value comes; {_REMEDY}")
    if not required and any(one.kind is Parameter.VAR_POSITIONAL for one in parameters):
        raise _Refused(f"{title} takes *args and so leaves open what it wants; name the value, or use functools.wraps")
    return bool(required)


def _config(parameters: list[Parameter]) -> Parameter | None:
    """The parameter that can be given as ``config=``."""
    named = (one for one in parameters if one.name == "config")
    return next((one for one in named if _positional(one) or one.kind is Parameter.KEYWORD_ONLY), None)


def _positional(one: Parameter) -> bool:
    return one.kind is Parameter.POSITIONAL_OR_KEYWORD


def _required(one: Parameter) -> bool:
    return one.default is Parameter.empty and one.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _bare(func: object) -> Any:
    """What lies under functools.partial."""
    while isinstance(func, functools.partial):
        func = func.func
    return func


def _yields(func: Any) -> bool:
    """Whether calling it gives a generator, sync or async; looks under decorators and into __call__."""
    layers: list[Any] = [func, type(func).__call__]
    layers += [_bare(inspect.unwrap(one)) for one in layers]
    return any(inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one) for one in layers)


def _name(func: object) -> str:
    return str(getattr(func, "__qualname__", None) or f"an object of class {type(func).__qualname__}")


def _describe_uncallable(func: object) -> str:
    found = type(func).__qualname__
    if func is None:
        return "missing; give func, or entry for a script"
    if isinstance(func, str):
        return "a string; for a script use entry="
    if inspect.isgenerator(func) or inspect.isasyncgen(func) or inspect.iscoroutine(func):
        return f"a {found}, the result of a call; pass the function itself, without ()"
    if callable(getattr(func, "process", None)):
        return f"an instance of {found}; pass the class itself, each worker makes its own instance"
    return f"of type {found}, which cannot be called"
