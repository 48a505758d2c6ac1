import pytest

from sftmix.data.prepare import Summary
from sftmix.errors import counted


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ["example"], "0 examples"),
        (1, ["example"], "1 example"),
        (1200, ["example"], "1,200 examples"),
        (1, ["row has", "rows have"], "1 row has"),
        (2, ["process", "processes"], "2 processes"),
    ],
)
def test_counts_agree_with_their_nouns(number, words, expected):
    assert counted(number, *words) == expected


def test_the_data_stage_speaks_of_one_example():
    lines = Summary(num_read=1, num_train=1, num_duplicates=1).lines()
    assert lines[0].startswith("1 example read: 1 to train on") and lines[1].startswith(
        "1 has the same content"
    )
