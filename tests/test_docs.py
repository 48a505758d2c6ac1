"""The pages lead somewhere, and their commands are ours."""

import re
import shlex

import pytest
from processes import ROOT

from sftmix.cli import _parser
from sftmix.config.shipped import packaged

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOW_TO = [
    ROOT / "README.md",
    ROOT / "docs/launch.md",
    ROOT / "docs/troubleshooting.md",
    *sorted((ROOT / "docs/howto").glob("*.md")),
]


def name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_repository_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def commands_of(page):
    """Yields the `sftmix` commands of a page's blocks of code."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?: {4})?(sftmix .*)$", text, flags=re.MULTILINE):
        yield shlex.split(re.split(r"  +#| > | \| ", line)[0], comments=True)[1:]


@pytest.mark.parametrize("page", HOW_TO, ids=name)
def test_commands_are_accepted_and_configs_are_there(page):
    found = list(commands_of(page))
    assert found or page.stem in ("troubleshooting",)
    for words in found:
        options = _parser().parse_args(words)
        config = getattr(options, "config", None)
        assert config in (None, "CONFIG") or packaged(config), words
