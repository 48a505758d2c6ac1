"""Token ids and masks under three real chat templates, counted by hand: every character is a
token."""

import numpy as np
import pytest
from tokenizers_for_tests import CHARACTERS, character_tokenizer

from sftmix.data.conversations import BadRow, Example, content_hash
from sftmix.data.encoding import ChatEncoder
from sftmix.data.template import ALPACA, CHATML, choose_template
from sftmix.errors import ConfigError, DataError

CHATML_WITH_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{"
    " '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] +"
    " '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
    " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif"
    " %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0"
    " % 2 == 0) %}{{ raise_exception('Conversation roles must alternate"
    " user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST]"
    " ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' +"
    " message['content'] + eos_token}}{% endif %}{% endfor %}"
)

TWO_TURNS = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "No"},
)
ONE_TURN = TWO_TURNS[:2]
SYSTEM = ({"role": "system", "content": "S"}, *ONE_TURN)


def example(messages, place="file:1", tools=()):
    return Example(content_hash(messages, tools), messages, place, tools=tools)


def encode(template, conversation, specials=(), **options):
    tokenizer = character_tokenizer(specials, chat_template=template, **options)
    [encoded] = ChatEncoder(tokenizer).encode([example(conversation)])
    if isinstance(encoded, BadRow):
        raise DataError(f"file:1: {encoded}")
    return tokenizer, encoded


def pieces(tokenizer, encoded):
    """Returns runs of (carries loss, text)."""
    ids, mask = encoded
    runs = []
    for token, carries_loss in zip(
        tokenizer.convert_ids_to_tokens(ids.tolist()), mask.tolist(), strict=True
    ):
        if runs and runs[-1][0] == carries_loss:
            runs[-1][1] += token
        else:
            runs.append([carries_loss, token])
    return [tuple(run) for run in runs]


IM = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def test_chatml():
    tokenizer, encoded = encode(CHATML_WITH_DEFAULT_SYSTEM, TWO_TURNS, IM)
    assert pieces(tokenizer, encoded) == [
        (
            False,
            (
                "<|im_start|>system\nBe"
                " kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            ),
        ),
        (True, "Yes.<|im_end|>"),
        (False, "\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "No<|im_end|>"),
        (False, "\n"),
    ]
    ids, mask = encoded
    # system 1+7+8+1+1, user 1+5+2+1+1, assistant 1+10 | 4+1 | 1, user 1+5+3+1+1, assistant 1+10 |
    # 2+1 | 1
    assert len(ids) == 18 + 10 + 11 + 5 + 1 + 11 + 11 + 3 + 1
    assert np.flatnonzero(mask).tolist() == [*range(39, 44), *range(67, 70)]
    start, end = 3, 4  # after <unk>, <s>, </s>
    first_character = 5
    assert ids[0] == start and ids[16] == end and ids[1] == first_character + CHARACTERS.index("s")


def test_llama3():
    tokenizer, encoded = encode(
        LLAMA3, TWO_TURNS, HEADER, bos="<|begin_of_text|>", eos="<|eot_id|>"
    )
    assert pieces(tokenizer, encoded) == [
        (
            False,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (True, "Yes.<|eot_id|>"),
        (
            False,
            "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (True, "No<|eot_id|>"),
    ]
    ids, mask = encoded
    # 1 + (1+4+1+2+2+1) + (1+9+1+2) | 4+1 | (1+4+1+2+3+1) + (1+9+1+2) | 2+1
    assert len(ids) == 1 + 11 + 13 + 5 + 12 + 13 + 3
    assert np.flatnonzero(mask).tolist() == [*range(25, 30), *range(55, 58)]
    assert ids[0] == 1 and ids[29] == 2  # bos and end of turn


def test_mistral():
    tokenizer, encoded = encode(MISTRAL, TWO_TURNS)
    assert pieces(tokenizer, encoded) == [
        (False, "<s>[INST] Hi [/INST]"),
        (True, " Yes.</s>"),
        (False, "[INST] So? [/INST]"),
        (True, " No</s>"),
    ]
    ids, mask = encoded
    assert len(ids) == 1 + 17 + 6 + 18 + 4  # the [INST] of this tokenizer are characters
    assert np.flatnonzero(mask).tolist() == [*range(18, 24), *range(42, 46)]


@pytest.mark.parametrize("conversation", [ONE_TURN, TWO_TURNS, SYSTEM])
def test_the_default_template_ends_every_turn(conversation):
    tokenizer, encoded = encode(ALPACA, conversation)
    trained = [text for carries_loss, text in pieces(tokenizer, encoded) if carries_loss]
    assert trained == [m["content"] + "</s>" for m in conversation if m["role"] == "assistant"]


def test_a_batch_gives_what_its_members_give_alone():
    tokenizer = character_tokenizer(IM, chat_template=CHATML)
    together = ChatEncoder(tokenizer).encode([*map(example, (ONE_TURN, TWO_TURNS, SYSTEM))])
    for conversation, (ids, mask) in zip((ONE_TURN, TWO_TURNS, SYSTEM), together, strict=True):
        [(alone, alone_mask)] = ChatEncoder(tokenizer).encode([example(conversation)])
        assert np.array_equal(ids, alone) and np.array_equal(mask, alone_mask)


DROPS_OLD_ANSWERS = (  # as templates of reasoning models do with earlier thoughts
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}{% if loop.last or m['role'] =="
    " 'user' %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (DROPS_OLD_ANSWERS, r"does not write the text of turn 2 \(assistant\)"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no end-of-turn token"),
        (
            "{% for m in messages %}{{ m['role'] }}{{ eos_token }}{% endfor %}",
            "does not write the text of turn 1",
        ),
        (
            (
                "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] + eos_token"
                " }}{% endfor %}"
            ),
            r"does not write the text of turn 1 \(user\)",
        ),
        ("{{ raise_exception('only haiku') }}", "refuses the conversation: only haiku"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        (
            "{{ 1 / (messages | length - messages | length) }}",
            "refuses the conversation: division by zero",
        ),
        ("{{ messages[0]['content'].no_such_method() }}", "refuses the conversation"),
        ("{{ messages[0] + 1 }}", "refuses the conversation"),
        ("{% include 'other' %}", "refuses the conversation"),
    ],
)
def test_a_template_that_hides_the_response_is_refused(template, message):
    with pytest.raises(DataError, match=message) as caught:
        encode(template, TWO_TURNS, IM)
    assert "file:1" in str(caught.value)


def test_a_token_over_the_border_of_the_response_drops_the_example_with_a_reason():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # "b c" is one token, and its middle is the border between prompt and response.
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, ":": 4, "c": 5, ":c": 6}
    backend = Tokenizer(models.BPE(vocabulary, [(":", "c")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}{{ ':' }}{% else %}{{"
        " eos_token }}{% endif %}{% endfor %}"
    )
    conversations = [
        tuple({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", answer)))
        for answer in ("c", "b")
    ]
    crossing, clean = ChatEncoder(tokenizer).encode([*map(example, conversations)])
    assert crossing == "a token reaches over the border between prompt and response"
    assert clean[1].tolist() == [False, False, True, True]


def test_named_template_comes_before_the_tokenizers_own_and_that_before_the_default(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("mine")
    assert choose_template("chatml", "own") == CHATML
    assert choose_template(str(file), "own") == "mine"
    assert choose_template(None, "own") == "own"
    assert choose_template(None, None) == ALPACA
    with pytest.raises(ConfigError, match="neither a built-in template"):
        choose_template("chatlm", None)


@pytest.mark.parametrize(
    "template", ["{{ missing.key.of }}", "{{ 1 / 0 }}", "{{ messages[7]['content'] }}"]
)
def test_a_template_that_fails_on_the_texts_of_a_new_tokenizer_is_refused(template):
    from sftmix.data.tokenizer import render_for_training

    with pytest.raises(
        DataError, match="training examples: the chat template refuses the conversation"
    ):
        render_for_training([example(TWO_TURNS)], template)


def test_an_unknown_filter_is_found_before_any_data_is_read(tmp_path):
    (tmp_path / "a.jinja").write_text("\n{{ messages | nofilter }}")
    with pytest.raises(
        ConfigError, match="a.jinja:2: not a Jinja template: No filter named 'nofilter'"
    ):
        choose_template(str(tmp_path / "a.jinja"), None)
