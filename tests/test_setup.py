"""The bounds of setup.py, and what is installed for whom."""

import runpy

import setuptools
from packaging.requirements import Requirement
from processes import ROOT


def given_to_setup(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_the_oldest_versions_are_the_lower_bounds_of_setup_py(monkeypatch):
    given = given_to_setup(monkeypatch)
    extras = [text for texts in given["extras_require"].values() for text in texts]
    oldest = set()
    for requirement in map(Requirement, [*given["install_requires"], *extras]):
        lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        oldest |= {f"{requirement.name}=={version}" for version in lowest}
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == sorted(oldest)


def test_triton_is_for_the_tests_alone(monkeypatch):
    given = given_to_setup(monkeypatch)
    named = {
        name: [Requirement(text).name for text in texts]
        for name, texts in given["extras_require"].items()
    }
    assert (
        "triton"
        not in [Requirement(text).name for text in given["install_requires"]] + named["lora"]
    )
    assert "triton" in named["dev"]
