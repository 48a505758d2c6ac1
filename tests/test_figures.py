"""Every measured figure of README.md and docs/ is read from a result in benchmarks/."""

import re

import pytest
from measured import MEASURED
from processes import ROOT

# Pages whose tables other tests compare with their source: tests/planning, tests/test_recipes.py.
ELSEWHERE = {"docs/kernels.md", "docs/planning.md", "docs/scaling.md", "docs/recipes.md"}
# Figures that nothing measured: of a paper, a definition, a setting, a version, a target.
GIVEN = {
    "README.md": ["15% of them", "0.4 M", "2.7 M", "1.8 GB", "95%", "0.005 nats"],
    "docs/evaluation.md": ["falls by 7%"],
    "docs/method.md": ["alpha 0.5"],
    "docs/packing.md": ["80%"],
    "docs/reliability.md": ["0.5 GB/s"],
    "docs/studies.md": ["95 to 96%", "95%", "80 to 85%", "0.0625"],
}
VERSION = r"(arXiv|torch|deepspeed|transformers|Python|DeepSpeed|Qwen|Llama|TRL)[- ]?\d+(\.\d+)*\+?"
FIGURE = r"(?<![\w./])(?<![A-Za-z]-)[+-]?\d+\.\d+(?![\w.]*\.\w|[A-Za-z])|\d+%"


def spaces(text):
    return re.sub(r"\s+", " ", text)


def prose(page):
    """The page without code, links and names of versions."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return spaces(text)


@pytest.mark.parametrize("page", MEASURED)
def test_measured_sentences_are_those_of_the_results(page):
    text = prose(page)
    for make in MEASURED[page]:
        assert spaces(make()) in text, f"{page} must say: {make()}"


PAGES = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", sorted({"README.md", *PAGES} - ELSEWHERE))
def test_no_figure_stands_alone(page):
    text = prose(page)
    for make in MEASURED.get(page, []):
        text = text.replace(spaces(make()), "")
    for given in GIVEN.get(page, []):
        assert given in text, f"{page} does not have {given!r} any more: take it off the list"
        text = text.replace(given, "")
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(VERSION, "", text)
    found = re.findall(FIGURE, text)
    assert not found, f"{page}: {found} come from no result (tests/support/measured.py)"
