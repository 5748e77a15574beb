"""What travels with a pipe, found by looking at its code: pickled functions, the submitter's own modules, scripts; and
what does not travel, but must be there: installed packages, the same Python.

    a function of __main__          its pickle holds it by value (cloudpickle)
    a module of the submitter's     a file or package outside of site-packages and the standard library: its whole
                                    top-level package goes along as a zip archive, and so does what that imports
    an installed package            its distribution and version are named; a node that lacks it says so at once
                                    (fitting.py)

Which modules: those whose functions, classes or module objects the pickler meets (it is asked, nothing is guessed from
names), and those that code imports inside of functions. Of modules that travel the source is read for imports; a
package is asked for only where a module that was really imported here imports it, outside of a `try` that does without.
"""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.util
import io
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from upipe.cluster import archive
from upipe.cluster.record import Shipment
from upipe.errors import ArchiveRefused, DeclarationError
from upipe.processor import Processor
from upipe.settings import MIB

MOST_MODULE_BYTES = 64 * MIB
"""Of one module of the submitter's, unpacked."""
FILES = 4096
"""Of sources whose imports are remembered: reading 300 of them takes 2 s of a start."""
_OURS = frozenset({"upipe", "__main__", "__mp_main__", "cloudpickle"})


class Freight:
    """A shipment with its contents."""

    def __init__(self, shipment: Shipment, contents: dict[str, bytes]) -> None:
        self.shipment = shipment
        self.contents = contents
        """By SHA-256 (hex)."""


def load_freight(processors: Sequence[Processor], codes: dict[str, bytes]) -> Freight:
    """Find and pack everything that a pipe needs on other hosts.

    Args:
        processors: of the pipe.
        codes: pickled Bundle by processor.

    Raises:
        DeclarationError: with every directory that is too large, and every script that cannot be read.
    """
    contents: dict[str, bytes] = {}

    def keep(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        contents[digest] = data
        return digest

    wrong: list[str] = []
    code = {name: keep(data) for name, data in codes.items()}
    scripts: dict[str, str] = {}
    beside: dict[str, Path] = {}
    """Modules that lie beside a script, which finds them there."""
    names: set[str] = set()
    for one in processors:
        names |= imported([one.func, one.config, [edge.key for edge in one.edges]])
        if one.entry is None:
            continue
        try:
            source = Path(one.entry).read_bytes()
        except OSError as error:
            wrong.append(f"processor {one.name!r}: its entry script {one.entry!r} cannot be read: {error.strerror}")
            continue
        scripts[one.name] = keep(source)
        found = _imports(source, one.entry)
        beside.update((name, place) for name in found if (place := _beside(name, Path(one.entry).parent)))
        names |= found - set(beside) if one.interpreter is None else set()
    local, packages = closure(names, beside)
    modules = []
    for name, places in sorted(local.items()):
        try:
            modules.append(keep(archive.pack_module(places, name, MOST_MODULE_BYTES)))
        except ArchiveRefused as error:
            wrong.append(f"module {name!r} cannot travel to the nodes: {error}")
    if wrong:
        raise DeclarationError(wrong, "what the pipe needs")
    python = ".".join(platform.python_version_tuple()[:2])
    return Freight(Shipment(code, scripts, tuple(modules), packages, python), contents)


# ---------------------------------------------------------------------------------------------------- what is used


def imported(value: Any) -> set[str]:
    """Top-level names of the modules that a pickle of the value refers to, and that its functions import."""
    watching = _Watching(io.BytesIO(), protocol=5)
    try:
        watching.dump(value)
    except Exception:  # who cannot be pickled has been told so when the pipe was declared
        pass
    return {name.partition(".")[0] for name in watching.names}


class _Watching(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles into nowhere, and notes every module it meets."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.names: set[str] = set()

    def persistent_id(self, value: Any) -> None:
        """Called with each object before it is pickled. None: pickle it as always."""
        if isinstance(value, ModuleType):
            self.names.add(value.__name__)
        elif isinstance(value, CodeType):
            self.names |= set(_imports_of_code(value))
        elif isinstance(value, (type, FunctionType)) or callable(value):
            name = getattr(value, "__module__", None)
            if isinstance(name, str):
                self.names.add(name)


def _imports_of_code(code: CodeType) -> Iterator[str]:
    """Of the imports inside a function. What it calls by name from its module is pickled with it, and seen there."""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME" and isinstance(step.argval, str) and step.argval:
            yield step.argval


def _imports(source: bytes, where: str) -> set[str]:
    """Top-level names that a source file imports, anywhere in it but where it would do without them."""
    try:
        tree = ast.parse(source, where)
    except (SyntaxError, ValueError):
        return set()  # whoever imports it is told, here as there
    found = set()
    optional = {id(node) for one in ast.walk(tree) if isinstance(one, ast.Try) for node in _tried(one)}
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _tried(block: ast.Try) -> Iterator[ast.AST]:
    """What stands in a `try` that expects an import to fail."""
    caught = [ast.unparse(one.type) if one.type is not None else "Exception" for one in block.handlers]
    if any(word in one for one in caught for word in ("ImportError", "ModuleNotFoundError", "Exception")):
        for statement in block.body:
            yield from ast.walk(statement)


# ---------------------------------------------------------------------------------------------------- where it lies


def closure(names: Iterable[str], known: dict[str, Path] | None = None) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Of modules and all that they import: where those of the submitter's lie, and the versions of distributions.

    Args:
        names: top-level.
        known: where modules lie that the import system does not find.
    """
    known = known or {}
    local: dict[str, list[Path]] = {}
    packages: dict[str, str] = {}
    installed: set[str] = set()
    needed, mentioned = {*names, *known}, set[str]()
    seen: set[str] = set()
    while todo := (needed | mentioned) - seen:
        name = min(todo)
        seen.add(name)
        if name in _OURS or name in sys.stdlib_module_names or not name.isidentifier():
            continue
        places = [known[name]] if name in known else _places(name)
        if places and not any(_installed(place) for place in places):
            local[name] = places
            really, perhaps = _imports_below(places)
            needed |= really
            mentioned |= perhaps
        elif places:
            installed.add(name)
    for name in sorted(installed & needed):
        packages.update(_distributions(name))
    return local, packages


def _places(name: str) -> list[Path]:
    """The file of a top-level module, or the directories of a package; [] when there is none (an optional import)."""
    module = sys.modules.get(name)
    try:
        spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if module is not None and spec is None:
        found = getattr(module, "__file__", None)
        return [Path(found).absolute()] if found else []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place).absolute() for place in spec.submodule_search_locations]
    return [Path(spec.origin).absolute()] if spec.origin and spec.has_location else []


def _beside(name: str, directory: Path) -> Path | None:
    for place in (directory / name, directory / f"{name}.py"):
        if (place / "__init__.py").is_file() or (place.suffix and place.is_file()):
            return place.absolute()
    return None


def _installed(place: Path) -> bool:
    parts = set(place.parts)
    if parts & {"site-packages", "dist-packages"}:
        return True
    return any(root in place.parents for root in _library())


@cache
def _library() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    ours = Path(__file__).absolute().parents[1]
    return (*(Path(paths[one]).absolute() for one in ("stdlib", "platstdlib", "purelib", "platlib")), ours)


def _imports_below(places: list[Path]) -> tuple[set[str], set[str]]:
    """What the files there import: those that were imported here (all, when none was), and all."""
    loaded = {os.path.abspath(file) for one in list(sys.modules.values()) if (file := getattr(one, "__file__", None))}
    found: dict[str, frozenset[str]] = {}
    for place in places:
        for file in [place] if place.is_file() else [Path(folder, name) for folder, name in _sources(place)]:
            try:
                state = file.stat()
                found[str(file)] = _imports_of_file(file, state.st_mtime_ns, state.st_size)
            except OSError:
                continue  # packing it says so
    really = [names for file, names in found.items() if file in loaded] or list(found.values())
    return set[str]().union(*really), set[str]().union(*found.values())


@lru_cache(FILES)
def _imports_of_file(file: Path, changed: int, size: int) -> frozenset[str]:
    """`changed` and `size` are those of now: a file that is written again is read again."""
    return frozenset(_imports(file.read_bytes(), str(file)) if file.suffix == ".py" else ())


def _sources(place: Path) -> Iterator[tuple[str, str]]:
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if name not in archive.SKIPPED]
        yield from ((folder, name) for name in names if name.endswith(".py"))


def _distributions(name: str) -> dict[str, str]:
    found = {}
    for distribution in _by_module().get(name, ()):
        found[distribution] = metadata.version(distribution)
    return found


@cache
def _by_module() -> dict[str, list[str]]:
    return {name: sorted(set(found)) for name, found in metadata.packages_distributions().items()}
