"""The page of a study, as text and as a browser shows it."""

from dataclasses import replace

import pytest
from pages import assert_shown_well
from trials import trial

from sftmix.config.study import load_study
from sftmix.studies.page import table_of, write_results
from sftmix.studies.results import compare

HOSTILE = "<script>alert(1)</script>" + "word" * 60


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"""
base: quickstart
tokenizer: {{path: "{HOSTILE}", train: null}}
study:
  dir: {tmp_path / "study"}
  seeds: 3
  control: ntp
  arms:
    ntp: {{mixup: {{weight: 0}}}}
    sftmix: {{tokenizer: {{path: "{HOSTILE}", train: null}}}}
    an-arm-with-a-name-that-is-much-too-long-for-a-phone: {{}}
"""
    )
    study = load_study(file)
    trials = {
        name: {seed: trial(loss + 0.1 * seed, exact=[0]) for seed in range(3)}
        for name, loss in zip(study.arms, (2.0, 1.9, 2.2), strict=True)
    }
    results = compare(trials, "ntp", "loss")
    write_results(
        study, results, {("sftmix", 7): f"{HOSTILE} failed"}, command=f"sftmix study {HOSTILE}"
    )
    return tmp_path / "study" / "index.html"


def test_what_comes_from_data_is_escaped_and_every_part_is_there(page):
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    for part in ("9 of 9 trials finished", "sftmix, seed 7 failed", "Seed by seed", "2.0000"):
        assert part in text
    markdown = (page.parent / "results.md").read_text()
    assert "| sftmix | 3 |" in markdown and "adjusted for 2 comparisons" in markdown


def test_it_fits_a_phone_is_dark_in_the_dark_and_asks_for_nothing(page):
    assert_shown_well(page)


def test_a_cost_that_no_arm_knows_has_no_column():
    def titles(**costs):
        trials = {
            name: {0: replace(trial(2.0, exact=[0]), costs={"train": known})}
            for name, known in (("ntp", {}), ("sftmix", costs))
        }
        return table_of(compare(trials, "ntp", "loss"))[0][6:]

    assert titles() == []
    assert titles(tokens=10.0) == ["tokens"]
    assert titles(minutes=1.0, tokens=10.0, watt_hours=0.5) == ["min", "tokens", "Wh"]
