"""Templates that behave as those of ten families do: the text is that of `apply_chat_template`, and
the loss is on what the assistant says. Every character is a token."""

import json

import numpy as np
import pytest
from tokenizers_for_tests import character_tokenizer

from sftmix.config.reader import load_config
from sftmix.data.conversations import BadRow, Example, content_hash
from sftmix.data.encoding import ChatEncoder
from sftmix.data.template import at_date
from sftmix.errors import ConfigError, DataError

IM = "<|im_start|>{role}\n{text}<|im_end|>\n"
TURN = "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
CHATML = "{%- for m in messages %}" + TURN + "{%- endfor %}" + ASK
# Writes tools and calls; answers of tools stand in a turn of the user.
QWEN25 = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for t in tools %}{{- t | tojson }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>' + m.content +"
    " '</tool_response><|im_end|>\n' }}{%- elif m.tool_calls %}{{- '<|im_start|>assistant' }}"
    "{%- if m.content %}{{- '\n' + m.content }}{%- endif %}{%- for c in m.tool_calls %}"
    "{{- '\n<tool_call>' + (c.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- else %}" + TURN + "{%- endif %}{%- endfor %}" + ASK
)
# Thoughts of earlier turns go, and the last answer has one, empty if need be.
QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set text = m.content %}"
    "{%- set thought = m.reasoning_content or '' %}{%- if '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.last %}{{- '<think>\n' + thought.strip('\n') +"
    " '\n</think>\n\n' }}{%- endif %}{{- text + '<|im_end|>\n' }}{%- else %}"
    + TURN
    + "{%- endif %}{%- endfor %}"
    + ASK
)
LLAMA31 = (
    "{{- bos_token }}{%- if strftime_now is defined %}{{- '<|start|>system<|mid|>\n\nToday: ' +"
    " strftime_now('%d %b %Y') + '<|eot|>' }}{%- endif %}{%- for m in messages %}{{- '<|start|>' +"
    " m.role + '<|mid|>\n\n' + m.content | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|mid|>\n\n' }}{%- endif %}"
)
# The system message stands in the last question.
MISTRAL = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}"
    "{%- for m in turns %}{%- if m.role == 'user' %}{{- '[INST] ' }}{%- if loop.index0 >="
    " turns | length - 2 and system is defined %}{{- system + '\n\n' }}{%- endif %}{{- m.content"
    " + '[/INST]' }}{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role)"
    " + '\n' + m.content | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<turn>model\n' }}{% endif %}"
)
# An end of text behind the last turn.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# A request for an answer opens a thought; thoughts in answers go.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content +"
    " '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + ASK
)
DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{%- endif %}" + CHATML
)
IM_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
FAMILIES = {
    "chatml": (CHATML, IM_TOKENS, "<|im_end|>"),
    "default system": (DEFAULT_SYSTEM, IM_TOKENS, "<|im_end|>"),
    "qwen2.5": (QWEN25, IM_TOKENS, "<|im_end|>"),
    "qwen3": (QWEN3, IM_TOKENS, "<|im_end|>"),
    "llama3.1": (LLAMA31, ("<|start|>", "<|mid|>", "<|eot|>"), "<|eot|>"),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), "</s>"),
    "gemma": (GEMMA, ("<turn>", "<end>"), "<end>"),
    "phi3": (PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|end|>"),
    "r1": (R1, ("<|User|>", "<|Assistant|>", "<think>", "</think>"), "</s>"),
    "generation": (GENERATION, IM_TOKENS, "<|im_end|>"),
}
ONE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."})
TWO = (*ONE, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"})


def example(messages, tools=()):
    return Example(content_hash(messages, tools), messages, "file:1", tools=tools)


def encoder_of(family, **options):
    template, specials, _ = FAMILIES[family]
    return ChatEncoder(character_tokenizer(specials, chat_template=template), **options)


def learnt(encoder, messages, tools=()):
    """Returns the texts that carry loss; raises what is wrong."""
    [encoded] = encoder.encode([example(tuple(messages), tools)])
    if isinstance(encoded, BadRow):
        raise encoded
    ids, mask = encoded
    tokens = np.array(encoder.tokenizer.convert_ids_to_tokens(ids.tolist()), dtype=object)
    starts = np.flatnonzero(mask & ~np.r_[False, mask[:-1]])
    stops = [*np.flatnonzero(~mask & np.r_[False, mask[:-1]]).tolist(), len(mask)]
    return ["".join(tokens[a:b]) for a, b in zip(starts, stops, strict=False)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one", "two"])
def test_the_answers_with_their_ends_carry_loss_and_the_ids_are_those_of_transformers(
    family, messages
):
    encoder = encoder_of(family)
    end = FAMILIES[family][2]
    space = " " if family == "mistral" else ""  # its model begins to write behind [/INST]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert learnt(encoder, messages) == [f"{space}{answer}{end}" for answer in answers]
    [(ids, _)] = encoder.encode([example(messages)])
    tokenizer = encoder.tokenizer
    dated = at_date(tokenizer.chat_template, "2024-07-26")
    theirs = tokenizer.apply_chat_template(list(messages), chat_template=dated, tokenize=True)
    theirs = theirs["input_ids"] if not isinstance(theirs, list) else theirs
    assert ids.tolist() == theirs


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gemma", "r1")])
def test_a_system_message_carries_no_loss(family):
    system = {"role": "system", "content": "S"}
    assert learnt(encoder_of(family), (system, *TWO)) == learnt(encoder_of(family), TWO)


def test_a_template_without_a_system_turn_refuses_the_row():
    with pytest.raises(BadRow, match="refuses the conversation: no system turn"):
        learnt(encoder_of("gemma"), ({"role": "system", "content": "S"}, *ONE))


@pytest.mark.parametrize("family", ["chatml", "qwen2.5", "llama3.1", "phi3", "generation"])
def test_the_assistant_may_speak_first(family):
    end = FAMILIES[family][2]
    found = learnt(encoder_of(family), ({"role": "assistant", "content": "Tea?"}, *ONE))
    assert found == [f"Tea?{end}", f"Yes.{end}"]


def test_a_turn_may_carry_no_loss():
    messages = (ONE[0], {**ONE[1], "train": False}, *TWO[2:])
    for family in FAMILIES:
        assert len(learnt(encoder_of(family), messages)) == 1, family


def test_a_thought_carries_loss_from_where_the_model_begins_to_write():
    thinking = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    inside = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    for answer in (thinking, inside):
        assert learnt(encoder_of("qwen3"), (ONE[0], answer)) == [
            "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
        ]
        encoder = encoder_of("qwen3")
        assert learnt(encoder, (ONE[0], answer, *TWO[2:]))[0] == "Yes.<|im_end|>"
        assert encoder.counts["thoughts of earlier turns that the chat template leaves out"] == 1


def test_a_thought_that_the_template_leaves_out_of_the_answer_is_refused():
    with pytest.raises(BadRow, match="does not write the thought .* of turn 2"):
        learnt(encoder_of("chatml"), (ONE[0], {**ONE[1], "reasoning_content": "Hm."}))


def test_what_the_template_inserts_carries_loss_where_that_is_asked_for():
    assert learnt(encoder_of("qwen3", loss_on_inserted=True), ONE) == [
        "<think>\n\n</think>\n\nYes.<|im_end|>"
    ]
    assert learnt(encoder_of("phi3", loss_on_inserted=True), ONE) == ["Yes.<|end|>\n</s>"]


def test_a_template_that_turns_the_conversation_round_is_refused():
    backwards = CHATML.replace("in messages %}", "in messages[::-1] %}")
    tokenizer = character_tokenizer(IM_TOKENS, chat_template=backwards)
    with pytest.raises(DataError, match="writes the turns in another order"):
        ChatEncoder(tokenizer).encode([example(TWO)])


CALL = {"type": "function", "function": {"name": "look", "arguments": {"town": "Ulm"}}}
TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
CALLING = (
    ONE[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Yes.", "tool_calls": [CALL]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "No"},
)


def test_calls_carry_loss_and_answers_of_tools_do_not():
    call = f"\n<tool_call>{json.dumps(CALL['function'])}</tool_call><|im_end|>"
    found = learnt(encoder_of("qwen2.5"), CALLING, TOOLS)
    # The template writes no line break before a call without content, and a prompt has one.
    assert [text.lstrip("\n") for text in found] == [
        call.lstrip("\n"), f"Yes.{call}", "No<|im_end|>"
    ]  # fmt: skip


def test_a_template_that_does_not_write_calls_or_tools_refuses_the_row():
    with pytest.raises(BadRow, match="does not write the `tool_calls` of turn 2"):
        learnt(encoder_of("chatml"), CALLING)
    with pytest.raises(BadRow, match=r"does not write the `tools` \(look\)"):
        learnt(encoder_of("chatml"), ONE, TOOLS)


def test_control_tokens_in_texts_are_texts_and_are_counted():
    quoting = (
        {"role": "user", "content": "Say <|im_end|>!"},
        {"role": "assistant", "content": "It is <s>1</s> <|im_end|>"},
    )
    encoder = encoder_of("chatml")
    [(ids, _)] = encoder.encode([example(quoting)])
    special = {encoder.tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<|im_end|>")}
    assert sum(number in special for number in ids.tolist()) == 2  # the ends of the two turns
    assert learnt(encoder, quoting) == ["It is <s>1</s> <|im_end|><|im_end|>"]
    assert encoder.counts["texts that quote a control token, which is tokenised as text"] == 4
    keeping = encoder_of("chatml", keep_control_tokens=True)
    [(ids, _)] = keeping.encode([example(quoting)])
    assert sum(number in special for number in ids.tolist()) == 6


def test_a_template_that_reads_the_clock_is_given_a_day():
    first, again, other = (
        encoder_of("llama3.1", date=day).encode([example(ONE)])[0][0].tolist()
        for day in ("2024-07-26", "2024-07-26", "2025-01-02")
    )
    assert first == again != other
    with pytest.raises(DataError, match="a format that is not a text"):
        at_date("{{ strftime_now(x) }}", "2024-07-26")


def test_a_day_is_text_or_what_yaml_makes_of_it_and_one_that_is_none_is_refused():
    for given in ("2024-10-01", "'2024-10-01'"):
        found = load_config("quickstart", [f"tokenizer.date={given}"])
        assert found.tokenizer.date == "2024-10-01"
    with pytest.raises(ConfigError, match="month must be in 1..12"):
        load_config("quickstart", ["tokenizer.date=2024-99-99"])
    with pytest.raises(ConfigError, match="expected a day such as 2024-07-26; month must be"):
        load_config("quickstart", ["tokenizer.date='2024-99-99'"])


def test_a_plain_text_carries_loss_on_everything_behind_its_first_token():
    encoder = encoder_of("chatml")
    [(ids, mask)] = encoder.encode([example(({"role": "text", "content": "ab"},))])
    assert encoder.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<s>", "a", "b", "</s>"]
    assert mask.tolist() == [False, True, True, True]


def test_a_generated_part_without_its_end_is_refused():
    open_ended = GENERATION.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    tokenizer = character_tokenizer(IM_TOKENS, chat_template=open_ended)
    with pytest.raises(DataError, match="before the end-of-turn token"):
        ChatEncoder(tokenizer).encode([example(ONE)])
