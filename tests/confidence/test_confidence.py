import math
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.confidence.definition import aggregate, agreement, confidence_ranks, perplexity
from sftmix.confidence.table import read_confidence
from sftmix.errors import ArtifactError

NAN, INF = float("nan"), float("inf")


def test_confidence_is_minus_the_mean_perplexity_over_the_checkpoints():
    found = aggregate({20: np.array([4.0, 3.0]), 10: np.array([2.0, 0.0])}, np.array([2, 3]))
    assert found.confidence == pytest.approx([-(np.e + np.e**2) / 2, -(1 + np.e) / 2])
    # population, not sample
    assert found.variability == pytest.approx([(np.e**2 - np.e) / 2, (np.e - 1) / 2])
    assert found.minimum == pytest.approx([np.e, 1.0]) and found.maximum == pytest.approx(
        [np.e**2, np.e]
    )


def test_the_aggregate_equals_a_loop_over_single_examples():
    rng = np.random.default_rng(0)
    nll_sum, counts = {step: rng.uniform(0, 90, 40) for step in (7, 2, 5)}, rng.integers(1, 30, 40)
    found = aggregate(nll_sum, counts)
    for row in range(40):
        values = [math.exp(nll_sum[step][row] / counts[row]) for step in nll_sum]
        assert found.confidence[row] == pytest.approx(-statistics.fmean(values), rel=1e-14)
        assert found.variability[row] == pytest.approx(statistics.pstdev(values), rel=1e-9)
        assert (found.minimum[row], found.maximum[row]) == pytest.approx(
            (min(values), max(values)), rel=1e-14
        )


def test_a_small_deviation_of_a_large_perplexity_is_not_lost():
    # a difference of squares gives nothing here
    found = aggregate({1: np.array([30.0]), 2: np.array([30.0 + 1e-9])}, np.array([1]))
    assert found.variability[0] == pytest.approx(math.exp(30) * 1e-9 / 2, rel=1e-4)


def test_an_example_has_the_same_bits_alone_and_among_others():
    rng = np.random.default_rng(1)
    nll_sum, counts = {step: rng.uniform(0, 9, 33) for step in range(12)}, rng.integers(1, 9, 33)
    together = aggregate(nll_sum, counts)
    alone = [
        aggregate(
            {step: sums[row : row + 1] for step, sums in nll_sum.items()}, counts[row : row + 1]
        )
        for row in range(33)
    ]
    assert [a.confidence[0] for a in alone] == list(together.confidence)
    assert [a.variability[0] for a in alone] == list(together.variability)


def test_perplexity_beyond_float64_is_infinite_and_no_error():
    assert perplexity(np.array([1e5, 1.0]), np.array([1, 1])).tolist() == [np.inf, np.e]
    found = aggregate({1: np.array([1e5, NAN, 0.0]), 2: np.zeros(3)}, np.ones(3, dtype=int))
    assert (
        found.confidence[0] == -INF and np.isnan(found.confidence[1]) and found.confidence[2] == -1
    )


def test_ranks_begin_with_the_most_confident_and_break_ties_by_id():
    ids = ["d", "b", "a", "Z", "c", "e", "f", "\u00e9", "g"]
    confidence = np.array([-3.0, -2.0, -2.0, -2.0, -1.0, NAN, -INF, -2.0, -9.0])
    ranks = confidence_ranks(pa.chunked_array([ids[:4], ids[4:]]), confidence).to_pylist()
    assert dict(zip(ids, ranks, strict=True)) == {
        "c": 1,
        "Z": 2,
        "a": 3,
        "b": 4,
        "\u00e9": 5,
        "d": 6,
        "g": 7,
        "e": None,
        "f": None,
    }


def table_of(path, ids, confidence):
    pq.write_table(pa.table({"example_id": ids, "confidence": confidence}), path)
    return path


def test_confidences_are_read_by_id_and_not_by_place(tmp_path):
    path = table_of(tmp_path / "confidence.parquet", ["a", "b", "c"], [-1.0, -2.0, -INF])
    assert read_confidence(path, ["c", "b", "a"]).tolist() == [-INF, -2.0, -1.0]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [(["a", "b", "c"], r"1 example has no score.*'c'"), (["a"], r"1 score has no example.*'b'")],
)
def test_a_table_that_does_not_fit_the_data_is_refused(tmp_path, wanted, message):
    path = table_of(tmp_path / "confidence.parquet", ["a", "b"], [-1.0, -2.0])
    with pytest.raises(ArtifactError, match=message):
        read_confidence(path, wanted)


@pytest.mark.parametrize(
    ("a", "b", "spearman"),
    [
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 2, 3, 4], [40, 30, 20, 10], -1.0),
        ([1, 2, 3, 4], [1, 10, 1e9, 1e200], 1.0),  # ranks, not values
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4
        # the first case among what is not finite
        ([1, NAN, 2, 3, 4, -INF], [1, 9, 3, 2, 4, 0], 0.8),
        ([1, 2, 3, 0], [1, 2, 3, NAN], 1.0),
        ([5, 5, 5], [1, 2, 3], NAN),
        ([1], [1], NAN),
        ([NAN, 1], [1, NAN], NAN),
    ],
)
def test_rank_correlation_equals_the_one_by_hand(a, b, spearman):
    found = agreement(
        np.array(a, dtype=float), np.array(b, dtype=float), ["x"] * len(a), ["x"] * len(b)
    )
    assert found["spearman"] == pytest.approx(spearman, nan_ok=True)


def test_the_share_in_the_same_part_is_over_finite_confidences():
    a, b = np.array([1.0, 2, 3, 4, NAN]), np.array([1.0, 2, 3, 4, 5])
    parts = (
        ["confident", "middle", "unconfident", "confident", "middle"],
        ["confident", "middle", "confident", "middle", "middle"],
    )
    assert agreement(a, b, *parts)["same_part"] == 0.5
    assert np.isnan(agreement(a[4:], b[4:], ["x"], ["x"])["same_part"])
