"""Does a node fit a pipe: sentences for what is missing."""

from __future__ import annotations

from upipe.cluster.fitting import differences, installed, misfit
from upipe.cluster.record import Shipment

HAS = {"numpy": "2.0", "here": ""}


def test_what_is_here_fits():
    shipment = Shipment({"a": "ab" * 32}, packages={"numpy": "1.0", "here": "3"}, python="3.11")
    assert misfit(shipment, "n1", HAS.get, "3.11") == ""
    assert differences(shipment, HAS.get) == ["numpy 2.0 (submitter: 1.0)"]


def test_a_missing_package_is_named_with_node_and_remedy():
    told = misfit(Shipment(packages={"gone": "1.2", "numpy": "2.0", "lost": ""}), "n1", HAS.get)
    assert "n1" in told and "gone, lost" in told and "pip install gone==1.2 lost" in told


def test_pickled_code_needs_the_same_python_and_scripts_do_not():
    told = misfit(Shipment({"a": "ab" * 32}, python="3.10"), "n1", HAS.get, "3.11")
    assert "3.10" in told and "3.11" in told and "n1" in told
    assert misfit(Shipment(scripts={"a": "ab" * 32}, python="3.10"), "n1", HAS.get, "3.11") == ""


def test_installed_sees_distributions_and_modules_without_importing():
    assert installed("msgspec")
    assert installed("json") == ""
    assert installed("no-such-thing") is None
    assert installed("") is None
