"""What travels: the submitter's own modules with all they import, scripts, versions of packages; nothing else."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec
import pytest

from upipe import Processor
from upipe.cluster import shipping
from upipe.cluster.fitting import misfit
from upipe.cluster.shipping import Freight, load_freight
from upipe.errors import DeclarationError

MODULES = {
    "ours_a.py": "import ours_b, json\nimport numpy as np\n"
    "try:\n    import msgspec\nexcept ImportError:\n    msgspec = None\n"
    "def work(value): return ours_b.twice(value)\n",
    "ours_b/__init__.py": "from ours_b.inner import twice\n",
    "ours_b/inner.py": "def twice(value): return 2 * value\n",
    "ours_b/unused.py": "import pytest, ours_d\n",
    "ours_b/data.txt": "data\n",
    "ours_c.py": "VALUE = 1\n",
    "ours_d.py": "VALUE = 2\n",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("ours_")]:
        del sys.modules[name]


def shipped(freight: Freight) -> set[str]:
    """Names of all files in its archives."""
    archives = [zipfile.ZipFile(BytesIO(freight.contents[one])) for one in freight.shipment.modules]
    return {name for one in archives for name in one.namelist()}


def function(text: str, **globals_: Any) -> Any:
    """A function of __main__, as a script defines it."""
    space: dict[str, Any] = {"__name__": "__main__", **globals_}
    exec(dedent(text), space)
    return space["work"]


def test_a_module_travels_whole_with_what_it_imports(place: Path) -> None:
    import ours_a  # type: ignore[import-not-found]

    freight = load_freight([Processor("a", ours_a.work)], {"a": b"code"})
    assert shipped(freight) == {"ours_a.py", "ours_d.py"} | {
        f"ours_b/{one}" for one in ("__init__.py", "inner.py", "unused.py", "data.txt")
    }
    assert set(freight.shipment.packages) == {"numpy"}  # not pytest: nothing imported ours_b.unused; not msgspec
    assert set(freight.contents) == set(freight.shipment.contents) and freight.shipment.code.keys() == {"a"}


def test_equal_code_has_equal_hashes(place: Path) -> None:
    import ours_a

    first, second = (load_freight([Processor("a", ours_a.work)], {}) for _ in range(2))
    assert first.shipment == second.shipment and first.contents == second.contents


@pytest.mark.parametrize(
    "text",
    [
        "def work(value):\n    import ours_c\n    return ours_c.VALUE",
        "import ours_c\ndef work(value): return ours_c.VALUE",
        "import ours_c\ndef helper(): return ours_c.VALUE\ndef work(value): return helper()",
        "def work(value):\n    def inner():\n        from ours_c import VALUE\n        return VALUE\n"
        "    return inner()",
    ],
)
def test_a_function_of_main_takes_along_what_it_imports(place: Path, text: str) -> None:
    assert shipped(load_freight([Processor("a", function(text))], {})) == {"ours_c.py"}


def test_text_that_looks_like_a_module_is_none(place: Path) -> None:
    import ours_c  # type: ignore[import-not-found]  # noqa: F401

    freight = load_freight([Processor("a", function("def work(value): return ['ours_c', 'msgspec']"))], {})
    assert not freight.shipment.modules and not freight.shipment.packages


def test_config_and_keys_count_too(place: Path) -> None:
    import ours_a
    import ours_c

    same = function("def work(value): return value")
    one, two = Processor("a", same, config={"module": ours_c}), Processor("b", len)
    one.add(two, key=ours_a.work)
    assert {"ours_a.py", "ours_c.py"} <= shipped(load_freight([one, two], {}))


def test_a_script_travels_with_the_modules_beside_it(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("VALUE = 1\n")
    script = folder / "script.py"
    script.write_text("import beside, json, msgspec\n")
    freight = load_freight([Processor("a", entry=str(script))], {})
    assert freight.contents[freight.shipment.scripts["a"]] == script.read_bytes()
    assert shipped(freight) == {"beside.py"} and set(freight.shipment.packages) == {"msgspec"}
    own = load_freight([Processor("a", entry=str(script), interpreter="/usr/bin/python3")], {})
    assert not own.shipment.packages  # its interpreter has packages of its own


def test_a_script_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=r"processor 'a'.*gone\.py.* cannot be read"):
        load_freight([Processor("a", entry=str(tmp_path / "gone.py"))], {})


def test_a_module_that_is_too_large_is_named_with_its_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ours_a

    monkeypatch.setattr(shipping, "MOST_MODULE_BYTES", 20)
    with pytest.raises(DeclarationError, match=f"module 'ours_b' cannot travel.*{place}/ours_b is too large"):
        load_freight([Processor("a", ours_a.work)], {})


def test_a_node_names_what_it_lacks() -> None:
    text = "import msgspec\ndef work(value): return msgspec.to_builtins(value)"
    shipment = load_freight([Processor("a", function(text))], {"a": b"code"}).shipment
    assert set(shipment.packages) == {"msgspec"} and misfit(shipment, "n1") == ""
    lacks = msgspec.structs.replace(shipment, packages={"no-such-dist": "1.2"})
    assert "no-such-dist==1.2" in misfit(lacks, "n1")
    assert "Python 2.7" in misfit(msgspec.structs.replace(shipment, python="2.7"), "n1")


def test_a_source_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "again.py"
    for name in ("first", "the_second"):
        file.write_text(f"import {name}\n")
        assert shipping._imports_below([file]) == ({name}, {name})
