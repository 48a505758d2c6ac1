import numpy as np
import pyarrow.parquet as pq
import pytest

from sftmix.confidence import confidence_table, perplexity, perplexity_table, read_confidence
from sftmix.errors import ArtifactError


def test_confidence_is_minus_the_mean_perplexity_over_the_checkpoints():
    nll_sum, counts = {10: np.array([2.0, 0.0]), 20: np.array([4.0, 3.0])}, np.array([2, 3])
    perplexities = np.stack([perplexity(sums, counts) for sums in nll_sum.values()])
    table = confidence_table(["a", "b"], perplexities).to_pydict()
    expected = [-(np.e + np.e**2) / 2, -(1 + np.e) / 2]
    assert table["confidence"] == pytest.approx(expected)
    assert table["variability"] == pytest.approx([(np.e**2 - np.e) / 2, (np.e - 1) / 2])
    assert table["min_perplexity"] == pytest.approx([np.e, 1.0]) and table["max_perplexity"] == pytest.approx([np.e**2, np.e])


def test_perplexity_beyond_float64_is_infinite_and_no_error():
    assert perplexity(np.array([1e5, 1.0]), np.array([1, 1])).tolist() == [np.inf, np.e]


def test_perplexity_table_has_a_row_per_checkpoint_and_example():
    table = perplexity_table(["a", "b"], {20: np.array([2.0, 3.0]), 10: np.array([4.0, 6.0])}, np.array([2, 3])).to_pydict()
    assert table["checkpoint"] == [10, 10, 20, 20] and table["example_id"] == ["a", "b", "a", "b"]
    assert np.log(table["perplexity"]) == pytest.approx([2.0, 2.0, 1.0, 1.0])


def test_confidences_are_read_by_id_and_not_by_place(tmp_path):
    path = tmp_path / "confidence.parquet"
    pq.write_table(confidence_table(["a", "b"], np.array([[1.0, 2.0]])), path)
    assert read_confidence(path, ["b", "a"]).tolist() == [-2.0, -1.0]


@pytest.mark.parametrize(
    ("wanted", "message"), [(["a", "b", "c"], r"1 examples have no score.*'c'"), (["a"], r"1 scores have no example.*'b'")]
)
def test_a_table_that_does_not_fit_the_data_is_refused(tmp_path, wanted, message):
    path = tmp_path / "confidence.parquet"
    pq.write_table(confidence_table(["a", "b"], np.array([[1.0, 2.0]])), path)
    with pytest.raises(ArtifactError, match=message):
        read_confidence(path, wanted)
