"""The chat templates of models, as an installed package has them: TRL ships some forty, many with a
second version that marks what the assistant writes (`{% generation %}`).

Of each the ids are those of `apply_chat_template`, and the loss is on the answers with their ends.
Where there are marks, they are a second opinion. Every character is a token.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers_for_tests import character_tokenizer

from sftmix.data.conversations import BadRow, Example, content_hash
from sftmix.data.encoding import ChatEncoder
from sftmix.data.template import at_date
from sftmix.errors import DataError

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
CONTROL = re.compile(
    r"<\|[^|<>]{1,40}\|>|<\uff5c[^\uff5c]{1,40}\uff5c>|<\w+_of_\w+>|<turn\|>|</?think>"
)
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
PLAIN = {name: text for name, text in TEMPLATES.items() if not re.search(r"{%-? generation", text)}
MARKED = {name: text for name, text in TEMPLATES.items() if name not in PLAIN}
# why a template is refused, in its own words
REFUSED = {
    "glm4moe": "writes no end-of-turn token",  # the name of the next speaker ends a turn
    "diffusion_gemma_training": "ends {% generation %} before the end-of-turn token",
}
# write only texts that are parts of a list
OF_PARTS = ("idefics3", "smolvlm", "llava_next")
ASKED = {"role": "user", "content": "Hi [there]"}
ONE = (ASKED, {"role": "assistant", "content": "Yes."})
TWO = (*ONE, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"})


def encoded(template, messages):
    """Returns the encoder's tokenizer, the ids, and whether each carries loss."""
    specials = sorted(set(CONTROL.findall(template)))
    encoder = ChatEncoder(character_tokenizer(specials, chat_template=template))
    [found] = encoder.encode([Example(content_hash(messages), messages, "file:1")])
    if isinstance(found, BadRow):
        raise found
    return encoder.tokenizer, found[0].tolist(), np.asarray(found[1])


def spans(tokenizer, ids, mask):
    tokens = np.array(tokenizer.convert_ids_to_tokens(ids), dtype=object)
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False].astype(int)))
    return ["".join(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def is_refused(name):
    return next((said for key, said in REFUSED.items() if name in (key, f"{key}_training")), None)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one", "two"])
def test_the_ids_are_those_of_transformers_and_the_answers_carry_loss(name, messages):
    template = TEMPLATES[name]
    said = is_refused(name) if name != "glm4moe_training" else None
    if said:
        with pytest.raises((DataError, BadRow), match=re.escape(said)):
            encoded(template, messages)
        return
    tokenizer, ids, mask = encoded(template, messages)
    given = list(messages)
    if name.removesuffix("_training") in OF_PARTS:
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    theirs = tokenizer.apply_chat_template(
        given, chat_template=at_date(template, "2024-07-26"), tokenize=True
    )
    assert ids == list(theirs if isinstance(theirs, list) else theirs["input_ids"])
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    found = spans(tokenizer, ids, mask)
    assert len(found) == len(answers)
    for span, answer in zip(found, answers, strict=True):
        before, _, end = span.partition(answer)
        assert end.strip() and len(tokenizer(end.strip())["input_ids"]) <= 2, span
        if name in OF_PARTS:  # their prompt ends with a colon: the space is the model's
            assert before == " ", span
        elif name in PLAIN:
            assert not before, span


@pytest.mark.parametrize(
    "name",
    [name for name in MARKED if name.removesuffix("_training") in PLAIN and not is_refused(name)],
)
def test_marks_of_the_template_agree_with_what_is_found_without_them(name):
    """Their part may begin earlier, by what the model is asked with, and end later, by white
    space."""
    marked, plain = (
        spans(*encoded(text, TWO)) for text in (MARKED[name], PLAIN[name.removesuffix("_training")])
    )
    for theirs, ours in zip(marked, plain, strict=True):
        assert ours.strip() in theirs, (theirs, ours)


def test_there_are_templates():
    assert len(PLAIN) > 30 and len(MARKED) > 20
