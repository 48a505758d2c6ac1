"""Hostfiles: what is read, and what is refused."""

import pytest
from processes import ROOT

from sftmix.cluster.hostfile import Node, read_hostfile
from sftmix.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-oProxyCommand=x slots=2", "is not a host name"),
        ("-v slots=2", "is not a host name"),
        ("a$(id) slots=2", "is not a host name"),
        ("a;rm slots=2", "is not a host name"),
        ("a slots=0", "expected 1 to"),
        ("a slots=99999999", "expected 1 to"),
        ("a slots=99999999999", "expected `host slots=N`"),
        ("a", "expected `host slots=N`"),
        ("a slots=2 and more", "expected `host slots=N`"),
        ("a slots=2\na slots=2", "hosts:2: a is listed twice"),
        ("# nothing\n", "names no node"),
    ],
)
def test_a_hostile_hostfile_is_refused(tmp_path, text, words):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match="hosts") as caught:
        read_hostfile(tmp_path / "hosts")
    assert words in str(caught.value)


def test_a_hostfile_is_read(tmp_path):
    (tmp_path / "hosts").write_text(
        "# two nodes\nnode-1.cluster slots=8  # old\n\n10.0.0.2 slots=4\n"
    )
    assert read_hostfile(tmp_path / "hosts") == [Node("node-1.cluster", 8), Node("10.0.0.2", 4)]


def test_the_example_can_be_read():
    assert [node.slots for node in read_hostfile(ROOT / "launch/hostfile")] == [8, 8]
