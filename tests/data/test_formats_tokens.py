"""Every format down to its tokens: what a row becomes, written by hand, with the loss in [[ ]].

The template writes a token for each role, `<E>` behind each turn, thoughts and calls. Every other
character is a token.
"""

import re

import numpy as np
import pytest
from tokenizers_for_tests import character_tokenizer

from sftmix.data.conversations import BadRow, Example
from sftmix.data.encoding import ChatEncoder
from sftmix.data.formats import FORMATS, Columns, detect_format, read_row

SPECIAL = ("<S>", "<U>", "<A>", "<T>", "<E>", "<think>", "</think>", "<call>", "</call>")
TEMPLATE = (
    "{%- if tools %}{{- '<S>' + tools[0].function.name + '<E>' }}{%- endif %}"
    "{%- for m in messages %}{{- '<' + m.role[0] | upper + '>' }}{%- if m.reasoning_content %}"
    "{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}{{- m.content }}"
    "{%- for c in m.tool_calls or [] %}{{- '<call>' + (c.function | tojson) + '</call>' }}"
    "{%- endfor %}{{- '<E>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<A>' }}{%- endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '{"name": "f", "arguments": {"a": 2}}'

# format -> rows with the tokens that they become
ROWS = {
    "alpaca": [
        (
            {"instruction": "p", "input": "q", "output": "r", "system": "y"},
            "<S>y<E><U>p\n\nq<E><A>[[r<E>]]",
        ),
        (
            {"instruction": "q", "output": "s", "history": [["p", "r"]]},
            "<U>p<E><A>[[r<E>]]<U>q<E><A>[[s<E>]]",
        ),
    ],
    "dolly": [
        ({"instruction": "p", "context": "q", "response": "r"}, "<U>p\n\nq<E><A>[[r<E>]]"),
    ],
    "prompt": [
        ({"prompt": "p", "completion": "r"}, "<U>p<E><A>[[r<E>]]"),
        (
            {
                "prompt": [
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "r"},
                    {"role": "user", "content": "q"},
                ],
                "completion": [{"role": "assistant", "content": "s"}],
            },
            "<U>p<E><A>r<E><U>q<E><A>[[s<E>]]",
        ),
    ],
    "qa": [({"question": "p", "answer": "r"}, "<U>p<E><A>[[r<E>]]")],
    "messages": [
        (
            {
                "messages": [
                    {"role": "developer", "content": "y"},
                    {"role": "user", "content": [{"type": "text", "text": "p"}]},
                    {"role": "assistant", "content": "r", "weight": 0},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "s", "reasoning_content": "t"},
                ]
            },
            "<S>y<E><U>p<E><A>r<E><U>q<E><A>[[<think>t</think>s<E>]]",
        ),
        (
            {
                "tools": TOOLS,
                "messages": [
                    {"role": "user", "content": "p"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 2}'}}],
                    },
                    {"role": "tool", "content": "3"},
                    {"role": "assistant", "content": "r"},
                ],
            },
            f"<S>f<E><U>p<E><A>[[<call>{CALL}</call><E>]]<T>3<E><A>[[r<E>]]",
        ),
    ],
    "sharegpt": [
        (
            {
                "system": "y",
                "tools": '[{"name": "f", "parameters": {"type": "object"}}]',
                "conversations": [
                    {"from": "human", "value": "p"},
                    {"from": "function_call", "value": CALL},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "r"},
                ],
            },
            f"<S>f<E><S>y<E><U>p<E><A>[[<call>{CALL}</call><E>]]<T>3<E><A>[[r<E>]]",
        ),
        (
            {
                "conversations": [
                    {"from": "GPT", "value": "h"},
                    {"from": "Human", "value": "p"},
                    {"from": "chatgpt", "value": "r"},
                ]
            },
            "<A>[[h<E>]]<U>p<E><A>[[r<E>]]",
        ),
    ],
    "choice": [
        (
            {"question": "p", "options": {"A": "x", "B": "z"}, "answer": "z", "answer_idx": "B"},
            "<U>p\n\nA. x\nB. z<E><A>[[B. z<E>]]",
        ),
        # from a table without types: the place of the option, or its text, which comes first
        (
            {"question": "p", "options": ["x", "z"], "answer": "1"},
            "<U>p\n\nA. x\nB. z<E><A>[[B. z<E>]]",
        ),
        (
            {"question": "p", "options": ["1", "0"], "answer": "1"},
            "<U>p\n\nA. 1\nB. 0<E><A>[[A. 1<E>]]",
        ),
    ],
    "medmcqa": [
        (
            {"question": "p", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": cop},
            "<U>p\n\nA. w\nB. x\nC. y\nD. z<E><A>[[C. y<E>]]",
        )
        for cop in (2, "2")
    ],
    # loss on everything that something predicts: the first token is the tokenizer's
    "text": [({"text": "p q"}, "<s>[[p q</s>]]")],
}


def expected(text):
    """Returns the tokens of a line of `ROWS`, and whether each carries loss."""
    parts = re.findall(r"\[\[|\]\]|<s>|</s>|" + "|".join(SPECIAL) + r"|[\s\S]", text)
    tokens, mask, carries_loss = [], [], False
    for part in parts:
        if part in ("[[", "]]"):
            carries_loss = part == "[["
        else:
            tokens.append(part)
            mask.append(carries_loss)
    return tokens, mask


@pytest.mark.parametrize(
    ("name", "row", "line"),
    [(name, row, line) for name, rows in ROWS.items() for row, line in rows],
    ids=[f"{name}-{number}" for name, rows in ROWS.items() for number in range(len(rows))],
)
def test_a_row_becomes_these_tokens_with_this_mask(name, row, line):
    columns = Columns({}, (), ())
    assert detect_format(row, "file:1", columns) == name
    read = read_row(row, name, columns)
    assert not read.unused
    tokenizer = character_tokenizer(SPECIAL, eos="<E>", chat_template=TEMPLATE)
    if name == "text":
        tokenizer = character_tokenizer(SPECIAL, chat_template=TEMPLATE)
    encoder = ChatEncoder(tokenizer)
    found = Example(read.content_id, read.messages, "file:1", tools=read.tools)
    [encoded] = encoder.encode([found])
    assert not isinstance(encoded, BadRow), encoded
    ids, mask = encoded
    tokens, carries_loss = expected(line)
    assert encoder.tokenizer.convert_ids_to_tokens(ids.tolist()) == tokens
    assert np.asarray(mask).tolist() == carries_loss


def test_every_format_has_a_row():
    assert set(ROWS) == set(FORMATS)
