"""Does this node fit what a pipe brings along? Its Python and its packages, looked at without starting anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable

from upipe.cluster.record import Shipment

Version = Callable[[str], str | None]
"""Version of a package here: "" unknown, None when it is missing."""


def installed(name: str) -> str | None:
    """As importlib sees it: by the name of the distribution, else of a module (without importing it)."""
    try:
        return importlib.metadata.version(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        pass
    try:
        return "" if importlib.util.find_spec(name.partition(".")[0].replace("-", "_")) is not None else None
    except (ImportError, ValueError):
        return None


def misfit(shipment: Shipment, node: str, version: Version = installed, python: str = "") -> str:
    """Why the code of a pipe cannot run on this node; "" when nothing is known against it.

    Args:
        node: how this node is called in the sentence.
        python: of this node; default the one that runs.
    """
    python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    if shipment.code and shipment.python and shipment.python != python:
        return (
            f"node {node} runs Python {python}, and the pipe was submitted from Python {shipment.python}: pickled "
            "functions need the same; use one version, pin the pipe to fitting nodes, or use entry scripts"
        )
    missing = sorted(name for name in shipment.packages if version(name) is None)
    if not missing:
        return ""
    told = " ".join(f"{name}=={shipment.packages[name]}" if shipment.packages[name] else name for name in missing)
    which = "lacks the package" if len(missing) == 1 else "lacks the packages"
    return f"node {node} {which} {', '.join(missing)}, which the pipe's code imports; install there: pip install {told}"


def differences(shipment: Shipment, version: Version = installed) -> list[str]:
    """Packages that are here in another version: told, not refused."""
    found = ((name, wanted, version(name)) for name, wanted in sorted(shipment.packages.items()))
    other = ((name, wanted, here) for name, wanted, here in found if here and wanted and here != wanted)
    return [f"{name} {here} (submitter: {wanted})" for name, wanted, here in other]
