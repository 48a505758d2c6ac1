"""Rows of all formats become the same shape, and a row that lacks something is refused with what it
lacks."""

import pytest

from sftmix.data.conversations import BadRow, Example, content_hash
from sftmix.data.formats import FORMATS, Columns, check_format, detect_format, read_row
from sftmix.errors import DataError


def to_messages(row, format_name, columns):
    found = read_row(row, format_name, Columns(columns))
    return found.messages, found.group


def detected(row, columns=None, **further):
    return detect_format(row, "file:1", Columns(columns or {}, **further))


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


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 2}}}
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
    "messages of parts": (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}],
                },
                {"role": "assistant", "content": "r"},
            ]
        },
        conversation("pq", "r"),
    ),
    "roles by other names": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "y"},
                {"role": "Human", "content": "p"},
                {"role": "Model", "content": "r"},
            ]
        },
        conversation("p", "r", system="y"),
    ),
    "messages with a thought, weights and nulls": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "p", "tool_calls": None},
                {"role": "assistant", "content": "r", "weight": 0},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "s", "reasoning_content": "t", "weight": 1},
            ]
        },
        (
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": "r", "train": False},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "s", "reasoning_content": "t"},
        ),
    ),
    "messages with a call": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "p"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 2}'}}],
                },
                {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
                {"role": "assistant", "content": "r"},
            ]
        },
        (
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "1"}]},
            {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "r"},
        ),
    ),
    "sharegpt with a call and a system column": (
        "sharegpt",
        {
            **sharegpt(
                ("human", "p"),
                ("function_call", '{"name": "f", "arguments": {"a": 2}}'),
                ("observation", "3"),
                ("gpt", "r"),
            ),
            "system": "y",
        },
        (
            {"role": "system", "content": "y"},
            {"role": "user", "content": "p"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "r"},
        ),
    ),
    "alpaca with history": (
        "alpaca",
        {"instruction": "q", "output": "s", "system": "y", "history": [["p", "r"]]},
        tuple(TURNS),
    ),
    "prompt and completion of messages": (
        "prompt",
        {"prompt": [*TURNS[:4]], "completion": [TURNS[4]]},
        (*TURNS[:2], {**TURNS[2], "train": False}, *TURNS[3:]),
    ),
    "choice of letters": (
        "choice",
        {"question": "p", "options": {"A": "x", "B": "z"}, "answer": "z", "answer_idx": "B"},
        conversation("p\n\nA. x\nB. z", "B. z"),
    ),
    "choice from a list": (
        "choice",
        {"question": "p", "options": ["x", "z"], "answer": 0},
        conversation("p\n\nA. x\nB. z", "A. x"),
    ),
    "choice of labels": (
        "choice",
        {"question": "p", "options": {"label": ["A", "B"], "text": ["x", "z"]}, "answer": "B"},
        conversation("p\n\nA. x\nB. z", "B. z"),
    ),
    "medmcqa": (
        "medmcqa",
        {"question": "p", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2},
        conversation("p\n\nA. w\nB. x\nC. y\nD. z", "C. y"),
    ),
    "text": ("text", {"text": "p"}, ({"role": "text", "content": "p"},)),
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
    assert detected(row) == format_name
    assert to_messages(row, format_name, {}) == (messages, None)


def test_every_format_has_a_case():
    assert {format_name for format_name, _, _ in CASES.values()} == set(FORMATS)


def test_detection_prefers_whole_conversations():
    row = {"instruction": "p", "output": "r", "messages": TURNS}
    assert detected(row) == "messages"


def test_detection_names_the_place_the_columns_and_the_formats():
    with pytest.raises(
        DataError, match=r"file:1: no known format has the columns \['output', 'text'\]"
    ) as caught:
        detected({"text": "t", "output": "r"})
    for name, found in FORMATS.items():
        assert f"{name}: {', '.join(found.required)}" in str(caught.value)


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
    assert detected(row, columns) == "alpaca"
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
            {"prompt": [{"role": "user", "content": "p"}], "completion": "r"},
            {},
            "field 'completion' is str, expected a list of turns",
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


def test_what_is_not_used_is_named_and_can_be_left_out():
    row = {
        "id": 7,
        "lang": None,
        "messages": [
            {"role": "user", "content": "p", "name": "x"},
            {"role": "assistant", "content": "r", "weight": 0, "refusal": None},
            {"role": "assistant", "content": "s"},
            {"role": "user", "content": "q"},
        ],
    }
    found = read_row(row, "messages", Columns({}))
    assert found.unused == {"id", "messages.name"}
    assert found.unanswered == 1
    ignored = Columns({}, ignored=("id", "messages.name", "messages.weight"))
    found = read_row(row, "messages", ignored)
    assert found.unused == set()
    assert "train" not in found.messages[1]
    assert read_row(row, "messages", Columns({}, only=("messages",))).unused == {"messages.name"}


def test_a_mapping_without_effect_is_refused():
    with pytest.raises(DataError, match=r"format messages, so that data.columns maps \['output'\]"):
        detected({"messages": TURNS}, {"output": "x"})
    with pytest.raises(DataError, match=r"data.ignore_columns names \['a'\], which are also used"):
        check_format("qa", Columns({"answer": "a"}, ignored=("a",)))
    with pytest.raises(DataError, match=r"maps to \['a'\], which data.use_columns does not name"):
        check_format("qa", Columns({"answer": "a"}, only=("question",)))


@pytest.mark.parametrize(
    ("format_name", "row", "message"),
    [
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "r", "weight": 0.5}]},
            "'weight' is 0.5, expected 0 or 1",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
            "has an image, and the models of this config read text only",
        ),
        ("messages", {"messages": TURNS, "system": "z"}, "both hold a system message"),
        ("messages", {"messages": TURNS, "tools": "[{"}, "'tools' is text, but not the JSON"),
        (
            "sharegpt",
            sharegpt(("human", "p"), ("function_call", "f()")),
            "turn 2 of 'conversations' is text, but not the JSON of a function call",
        ),
        (
            "alpaca",
            {"instruction": "p", "output": "r", "history": [["q"]]},
            "pair 1 of 'history' is not",
        ),
        ("choice", {"question": "p", "options": ["x", "z"], "answer": "w"}, "none of the options"),
        ("choice", {"question": "p", "options": ["x"], "answer": "x"}, "holds no two options"),
        (
            "medmcqa",
            {"question": "p", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 4},
            "'cop' is 4, expected 0 to 3",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(format_name, row, message):
    with pytest.raises(BadRow, match=message):
        read_row(row, format_name, Columns({}))


def test_tools_are_part_of_the_id():
    row = {"messages": TURNS}
    tools = [{"type": "function", "function": {"name": "f"}}]
    plain, with_tools = (
        read_row(r, "messages", Columns({})) for r in (row, {**row, "tools": tools})
    )
    assert with_tools.tools == tuple(tools)
    assert plain.content_id != with_tools.content_id
    assert read_row({**row, "tools": "[]"}, "messages", Columns({})) == plain


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
            [QUESTION, {"role": "critic", "content": "r"}],
            "turn 2 of 'messages' has the role 'critic', expected one of",
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
            "turn 2 of 'messages' has a part of the kind 'str'; expected text, or parts",
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
                r" 'image', 'images', 'question', 'system'\]"
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
        check_format(format_name, Columns(columns))


@pytest.mark.parametrize("format_name", ["auto", *FORMATS])
def test_a_known_format_takes_a_mapping_of_its_fields_and_of_the_group(format_name):
    fields = FORMATS[format_name].fields if format_name in FORMATS else {"question", "context"}
    check_format(format_name, Columns(dict.fromkeys(fields, "column")))


def example_id(row, columns=None):
    format_name = detected(row, columns)
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
