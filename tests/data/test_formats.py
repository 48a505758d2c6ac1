"""Rows of six formats become the same shape, and a row that lacks something is refused with what it
lacks."""

import pytest

from sftmix.data.formats import (
    FORMATS,
    BadRow,
    Example,
    check_format,
    content_hash,
    detect_format,
    to_messages,
)
from sftmix.errors import DataError


def conversation(*contents, system=None):
    """Returns messages of user and assistant in turn, behind an optional system message."""
    head = [{"role": "system", "content": system}] if system else []
    return (
        *head,
        *(
            {"role": ("user", "assistant")[n % 2], "content": text}
            for n, text in enumerate(contents)
        ),
    )


def sharegpt(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


TURNS = [*conversation("p", "r", "q", "s", system="y")]
CASES = {
    "alpaca": ("alpaca", {"instruction": "p", "output": "r"}, conversation("p", "r")),
    "alpaca with input": (
        "alpaca",
        {"instruction": "p", "input": "q", "output": "r"},
        conversation("p\n\nq", "r"),
    ),
    "alpaca with blank input": (
        "alpaca",
        {"instruction": "p", "input": " \n", "output": "r"},
        conversation("p", "r"),
    ),
    "alpaca with null input": (
        "alpaca",
        {"instruction": "p", "input": None, "output": "r"},
        conversation("p", "r"),
    ),
    "alpaca with system": (
        "alpaca",
        {"system": "y", "instruction": "p", "output": "r"},
        conversation("p", "r", system="y"),
    ),
    "alpaca with blank system": (
        "alpaca",
        {"system": " ", "instruction": "p", "output": "r"},
        conversation("p", "r"),
    ),
    "alpaca with more columns": (
        "alpaca",
        {"id": 7, "instruction": "p", "output": "r", "text": None},
        conversation("p", "r"),
    ),
    "white space stays": (
        "alpaca",
        {"instruction": " p\n", "output": "\tr "},
        conversation(" p\n", "\tr "),
    ),
    "dolly": (
        "dolly",
        {"instruction": "p", "context": "q", "response": "r", "category": "qa"},
        conversation("p\n\nq", "r"),
    ),
    "dolly without context": (
        "dolly",
        {"instruction": "p", "context": "", "response": "r"},
        conversation("p", "r"),
    ),
    "prompt": ("prompt", {"prompt": "p", "completion": "r"}, conversation("p", "r")),
    "qa": ("qa", {"question": "p", "answer": "r"}, conversation("p", "r")),
    "messages": ("messages", {"messages": TURNS}, tuple(TURNS)),
    "messages with more keys": (
        "messages",
        {"messages": [{**turn, "name": "x"} for turn in TURNS]},
        tuple(TURNS),
    ),
    "messages with trailing questions": (
        "messages",
        {"messages": [*TURNS, TURNS[1], TURNS[1]]},
        tuple(TURNS),
    ),
    "sharegpt": (
        "sharegpt",
        sharegpt(("system", "y"), ("human", "p"), ("gpt", "r")),
        conversation("p", "r", system="y"),
    ),
    "sharegpt with trailing question": (
        "sharegpt",
        sharegpt(("human", "p"), ("gpt", "r"), ("human", "q")),
        conversation("p", "r"),
    ),
    "beyond ASCII": (
        "qa",
        {"question": "\u00fc\u4e16", "answer": "\U0001f600"},
        conversation("\u00fc\u4e16", "\U0001f600"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_row_is_detected_and_turned_into_messages(case):
    format_name, row, messages = CASES[case]
    assert detect_format(row, "file:1", {}) == format_name
    assert to_messages(row, format_name, {}) == (messages, None)


def test_every_format_has_a_case():
    assert {format_name for format_name, _, _ in CASES.values()} == set(FORMATS)


def test_detection_prefers_whole_conversations():
    row = {"instruction": "p", "output": "r", "messages": TURNS}
    assert detect_format(row, "file:1", {}) == "messages"


def test_detection_names_the_place_the_columns_and_the_formats():
    with pytest.raises(
        DataError, match=r"file:1: no known format has the columns \['output', 'text'\]"
    ) as caught:
        detect_format({"text": "t", "output": "r"}, "file:1", {})
    for name, (required, _, _) in FORMATS.items():
        assert f"{name}: {', '.join(required)}" in str(caught.value)


@pytest.mark.parametrize(("value", "group"), [("maths", "maths"), (3, "3"), (None, None)])
def test_the_group_is_kept_as_text(value, group):
    assert to_messages({"question": "p", "answer": "r", "group": value}, "qa", {}) == (
        conversation("p", "r"),
        group,
    )


def test_columns_map_fields_to_the_columns_of_the_file():
    columns = {"instruction": "task", "input": "about", "output": "solution", "group": "topic"}
    row = {
        "task": "p",
        "about": "q",
        "solution": "r",
        "topic": "t",
        "input": "another",
        "group": "another",
    }
    assert detect_format(row, "file:1", columns) == "alpaca"
    assert to_messages(row, "alpaca", columns) == (conversation("p\n\nq", "r"), "t")


QA = {"question": "p", "answer": "r"}
HALF = "half of a pair: \ud83d"


@pytest.mark.parametrize(
    ("format_name", "row", "columns", "message"),
    [
        ("qa", {"question": "p"}, {}, "no field 'answer'"),
        ("qa", QA, {"answer": "solution"}, "no field 'solution'"),
        ("qa", QA, {"group": "topic"}, "no field 'topic'"),
        ("alpaca", {"instruction": "p", "output": "r"}, {"input": "context"}, "no field 'context'"),
        ("qa", {**QA, "answer": None}, {}, "field 'answer' is null, expected text"),
        ("qa", {**QA, "answer": 4}, {}, "field 'answer' is int, expected text"),
        (
            "prompt",
            {"prompt": ["p"], "completion": "r"},
            {},
            "field 'prompt' is list, expected text",
        ),
        (
            "alpaca",
            {"instruction": "p", "input": 1.5, "output": "r"},
            {},
            "field 'input' is float, expected text",
        ),
        (
            "alpaca",
            {"instruction": "p", "system": {}, "output": "r"},
            {},
            "field 'system' is dict, expected text",
        ),
        (
            "dolly",
            {"instruction": "p", "context": True, "response": "r"},
            {},
            "field 'context' is bool, expected text",
        ),
        (
            "sharegpt",
            sharegpt(("human", "p"), ("bing", "r")),
            {},
            "turn 2 of 'conversations' has the role 'bing', expected one of",
        ),
        (
            "sharegpt",
            {"conversations": TURNS},
            {},
            "turn 1 of 'conversations' has no 'from' and 'value'",
        ),
        ("qa", {**QA, "answer": HALF}, {}, "an unpaired surrogate"),
        ("qa", {**QA, "group": HALF}, {}, "an unpaired surrogate"),
    ],
)
def test_a_row_that_lacks_something_is_refused_with_what_it_lacks(
    format_name, row, columns, message
):
    with pytest.raises(BadRow, match=message):
        to_messages(row, format_name, columns)


QUESTION = {"role": "user", "content": "p"}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "field 'messages' is empty, expected a list of turns"),
        (None, "field 'messages' is NoneType, expected a list of turns"),
        ("p", "field 'messages' is str, expected a list of turns"),
        (["p"], "turn 1 of 'messages' has no 'role' and 'content'"),
        ([QUESTION, {"role": "assistant"}], "turn 2 of 'messages' has no 'role' and 'content'"),
        (
            [QUESTION, {"role": "tool", "content": "r"}],
            "turn 2 of 'messages' has the role 'tool', expected one of",
        ),
        (
            [QUESTION, {"role": None, "content": "r"}],
            "turn 2 of 'messages' has the role None, expected one of",
        ),
        (
            [QUESTION, {"role": ["user"], "content": "r"}],
            r"turn 2 of 'messages' has the role \['user'\], expected one of",
        ),
        (
            [QUESTION, {"role": "assistant", "content": None}],
            "turn 2 of 'messages' is NoneType, expected text",
        ),
        (
            [QUESTION, {"role": "assistant", "content": ["r"]}],
            "turn 2 of 'messages' is list, expected text",
        ),
        ([QUESTION, {"role": "assistant", "content": HALF}], "an unpaired surrogate"),
        ([QUESTION], "no turn of 'messages' is the assistant's"),
    ],
)
def test_a_conversation_with_a_bad_turn_is_refused_with_its_number(turns, message):
    with pytest.raises(BadRow, match=message):
        to_messages({"messages": turns}, "messages", {})


@pytest.mark.parametrize(
    ("format_name", "columns", "message"),
    [
        ("alpacca", {}, "data.format is 'alpacca'; expected auto, messages, .*alpaca"),
        (
            "qa",
            {"output": "r"},
            (
                r"maps \['output'\], which format 'qa' does not have; it has \['answer', 'group',"
                r" 'question'\]"
            ),
        ),
        (
            "auto",
            {"outptu": "r", "answer": "a"},
            r"data.columns maps \['outptu'\], which format 'auto' does not have",
        ),
    ],
)
def test_an_unknown_format_or_field_is_refused(format_name, columns, message):
    with pytest.raises(DataError, match=message):
        check_format(format_name, columns)


@pytest.mark.parametrize("format_name", ["auto", *FORMATS])
def test_a_known_format_takes_a_mapping_of_its_fields_and_of_the_group(format_name):
    required, optional, _ = FORMATS.get(format_name, (("question",), ("context",), None))
    check_format(format_name, dict.fromkeys((*required, *optional, "group"), "column"))


def example_id(row, columns=None):
    format_name = detect_format(row, "file:1", columns or {})
    return content_hash(to_messages(row, format_name, columns or {})[0])


def test_the_id_depends_on_the_content_and_not_on_format_columns_or_group():
    same = [
        example_id(QA),
        example_id({"prompt": "p", "completion": "r"}),
        example_id({"instruction": "p", "input": "", "output": "r"}),
        example_id(
            {"q": "p", "a": "r", "group": "t", "number": 3}, {"question": "q", "answer": "a"}
        ),
        example_id(sharegpt(("human", "p"), ("gpt", "r"))),
        example_id({"messages": [*conversation("p", "r", "trailing question")]}),
    ]
    assert len(set(same)) == 1


@pytest.mark.parametrize(
    "other",
    [
        conversation("p", "s"),
        conversation("p ", "r"),
        conversation("r", "p"),
        conversation("p", "r", system="y"),
        conversation("p", "r", "p", "r"),
        ({"role": "system", "content": "p"}, {"role": "assistant", "content": "r"}),
        conversation("", "pr"),
        # the same letters, if roles and contents were only strung together
        conversation("passistantr"),
    ],
)
def test_other_content_has_another_id(other):
    assert content_hash(other) != content_hash(conversation("p", "r"))


def test_the_id_of_a_copy_leads_back_to_its_content():
    plain = content_hash(conversation("p", "r"))
    for copy in (plain, f"{plain}-2", f"{plain}-13"):
        assert Example(copy, conversation("p", "r"), "file:1").content_id == plain
