"""What the report computes and draws, on small tables of its own."""

import numpy as np
import pytest

from sftmix.config import SplitConfig
from sftmix.pairing import CONFIDENT, UNCONFIDENT, split_by_confidence
from sftmix.report import plots
from sftmix.report.examples import ScoredExamples, agreement_of, duplicates, extremes, truncated


def scored_examples(count=40, *, ids=None, confidence=None, variability=None, is_perplexity=True):
    rng = np.random.default_rng(0)
    ids = ids or [f"{n:016x}" for n in range(count)]
    confidence = -np.exp(rng.normal(size=count)) if confidence is None else np.asarray(confidence, dtype=float)
    finite = np.where(np.isfinite(confidence), confidence, -1e9)
    table = [{"example_id": i, "group": None, "messages": f'[{{"role": "user", "content": "<b>{i}</b>"}}]'} for i in ids]
    return ScoredExamples(
        ids,
        confidence,
        rng.random(count) if variability is None else np.asarray(variability, dtype=float),
        np.array(split_by_confidence(ids, finite)),
        rng.integers(1, 200, count),
        rng.random(count) < 0.3,
        is_perplexity,
        table,
    )


def test_most_and_least_confident_examples_leave_out_what_is_not_finite():
    scored = scored_examples(5, confidence=[-3.0, -np.inf, -1.0, np.nan, -2.0])
    most, least = (section["rows"] for section in extremes(scored))
    assert [row["value"] for row in most] == [1.0, 2.0, 3.0] and [row["value"] for row in least] == [3.0, 2.0, 1.0]


def test_copies_are_grouped_by_content():
    scored = scored_examples(6, ids=["aa", "bb", "aa-2", "cc", "aa-3", "bb-2"], confidence=[-1.0, -2.0, -4.0, -9.0, -2.0, -2.5])
    found = duplicates(scored)
    assert (found["num_groups"], found["num_examples"]) == (2, 5)
    first, second = found["rows"]
    assert (first["example_id"], first["num_copies"], first["lowest"], first["highest"], first["spread"]) == ("aa", 3, 1.0, 4.0, 3.0)
    assert (second["example_id"], second["num_copies"], second["spread"]) == ("bb", 2, 0.5)
    parts = dict(zip(scored.example_ids, scored.part, strict=True))
    assert found["num_apart"] == (len({parts[i] for i in ("aa", "aa-2", "aa-3")}) > 1) + (len({parts[i] for i in ("bb", "bb-2")}) > 1)


def test_truncated_examples_are_counted_in_each_part():
    scored = scored_examples()
    found = truncated(scored)
    assert found["num_truncated"] == scored.is_truncated.sum() == sum(row["num_truncated"] for row in found["parts"]) > 0
    shares = {row["part"]: row["share"] for row in found["parts"]}
    assert shares[CONFIDENT] == scored.is_truncated[scored.part == CONFIDENT].mean()
    expected = sorted((-scored.confidence[scored.is_truncated]).tolist(), reverse=True)[:10]
    assert [row["value"] for row in found["rows"]] == expected


def test_agreement_is_taken_over_what_is_finite_in_both():
    ids = list("abcdef")
    a = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 9.0])
    b = np.array([1.0, 3.0, 2.0, 4.0, 5.0, -np.inf])
    found = agreement_of(ids, a, b, SplitConfig(), "checkpoints, online")
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))  # of 1234 and 1324
    assert found.same_part == 0.5 and (found.num_examples, found.num_left_out) == (4, 2)
    assert found.line().startswith("checkpoints, online: Spearman 0.8000, 50.0% of 4 examples in the same part, 2 left out")


def test_data_map_keeps_both_ends_and_thins_evenly(monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 10)
    scored = scored_examples(101, confidence=-np.arange(1.0, 102.0), variability=[np.nan, *np.ones(100)])
    points, num_left_out = plots.points_of_data_map(scored)
    assert num_left_out == 1 and len(points) == 10
    assert sorted(points.tolist()) == np.linspace(1, 100, 10).round().astype(int).tolist()


@pytest.mark.parametrize("is_perplexity", [True, False])
def test_figures_have_the_same_bytes_each_time(is_perplexity):
    confidence = None if is_perplexity else np.linspace(-3, 5, 40)
    scored = scored_examples(confidence=confidence, is_perplexity=is_perplexity)
    points, _ = plots.points_of_data_map(scored)
    image = plots.data_map(scored, points)
    assert image == plots.data_map(scored, points) and image.startswith(b"\x89PNG")
    assert plots.confidence_histogram(scored) == plots.confidence_histogram(scored)


def test_boundaries_lie_between_the_parts():
    scored = scored_examples(confidence=-np.arange(1.0, 41.0))
    assert plots.boundaries(scored) == [-20.5]
    assert (scored.confidence[scored.part == UNCONFIDENT] < -20.5).all()
