"""`sftmix chat` against transformers' own generation."""

import io
import shutil

import pytest
import torch
from processes import sftmix
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.errors import ArtifactError, ConfigError
from sftmix.evaluation.chat import Conversation, chat

pytestmark = pytest.mark.recipe
INVALID = "\N{REPLACEMENT CHARACTER}"
GREEDY = {"max_new_tokens": 12, "temperature": 0.0}
SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system first') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture
def model(trained, tmp_path):
    """Returns a model with large random weights, so that its answers depend on every turn."""
    shutil.copytree(trained / "run" / "sftmix" / "model", tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.5, generator=generator)
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(SYSTEM_FIRST)
    return tmp_path / "model"


def generated(model, turns):
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    answer = network.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("system", [None, "one two"])
def test_each_answer_is_that_of_transformers_for_all_turns_so_far(model, system):
    conversation = Conversation(str(model), system=system, **GREEDY)
    turns = [turn("system", system)] if system else []
    for text in ("Say red 3", "Say four 9", "north"):
        turns.append(turn("user", text))
        shown = "".join(conversation.answer(text))
        answer = conversation.turns[-1]["content"]
        assert answer == generated(model, turns)
        assert shown == answer or INVALID in answer  # bytes that are no text are shown otherwise
        turns.append(turn("assistant", answer))
    conversation.clear()
    "".join(conversation.answer("Say red 3"))
    assert len(conversation.turns) == 2 and conversation.turns[-1]["content"] == generated(
        model, [*turns[: len(turns) % 2], turn("user", "Say red 3")]
    )


def test_two_models_answer_each_line_and_commands_hold_for_both(
    model, trained, monkeypatch, capsys
):
    other = trained / "run"
    lines = ["Say red 3", "", "/system one", "/nothing", "/clear", "Say red 3", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat([str(model), str(other)], system=None, **GREEDY)
    out = capsys.readouterr().out
    first = generated(model, [turn("user", "Say red 3")])
    second = generated(model, [turn("system", "one"), turn("user", "Say red 3")])
    assert first != second
    assert {first, second}.isdisjoint(["", INVALID])
    shown = [
        line.removeprefix(f"{model}> ") for line in out.splitlines() if line.startswith(f"{model}>")
    ]
    assert len(shown) == 2 and shown[0] != shown[1]
    assert out.count(f"{other}> ") == 2 and "/nothing is no command" in out and "never" not in out


def test_an_answer_that_is_closed_early_stops_and_is_kept(model):
    conversation = Conversation(str(model), system=None, max_new_tokens=400, temperature=0.0)
    answer = conversation.answer("Say red 3")
    first = next(answer)
    answer.close()
    said = conversation.turns[-1]["content"]
    assert [each["role"] for each in conversation.turns] == ["user", "assistant"]
    assert said.startswith(first) or INVALID in said
    assert len(said) < 300  # it would have written on


def test_a_full_context_forgets_the_oldest_turns_and_says_so(model):
    conversation = Conversation(str(model), system=None, max_new_tokens=12, temperature=0.0)
    conversation._model.config.max_position_embeddings = 60
    for _ in range(8):
        shown = "".join(conversation.answer("Say red 3"))
    assert "forgotten: the context is full]" in shown
    assert conversation._prompt_ids(conversation.turns[:-1]).shape[1] + 12 <= 60
    with pytest.raises(ArtifactError, match="leaves no room for 12 more"):
        "".join(conversation.answer("north south " * 40))


def test_what_is_no_model_or_takes_no_system_prompt_is_said(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds neither a model"):
        Conversation(str(tmp_path / "empty"), system=None, **GREEDY)
    (model / "chat_template.jinja").write_text(NO_SYSTEM)
    with pytest.raises(ConfigError, match="no system. Leave the system prompt out"):
        Conversation(str(model), system="be brief", **GREEDY)
    done = sftmix("chat", str(tmp_path / "empty"), check=False)
    assert done.returncode == 2 and "holds neither a model" in done.stderr
