"""Chat templates, and the response mask: which tokens carry loss.

The loss covers every assistant turn with its end-of-turn token, and nothing else. Most templates do
not mark the generated part, so it is derived: the conversation is rendered as a whole, and again up
to each assistant turn; each of these texts must be a prefix of the whole. What the template writes
after the end-of-turn token (a newline, in ChatML) carries no loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sftmix.data.formats import Message
from sftmix.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# part of the data fingerprint: increase it when masks change
MASK_POLICY = "assistant-turns-with-end-of-turn/1"

# The default for base models, which have no template: plain text in Alpaca's style, ended by the
# tokenizer's end-of-sequence token, so that the vocabulary needs no new token.
ALPACA = (
    "{{- bos_token or '' -}}{%- for message in messages -%}{%- if message['role'] == 'system' -%}{{"
    " message['content'] + '\\n\\n' }}{%- elif message['role'] == 'user' -%}{{ '###"
    " Instruction:\\n' + message['content'] + '\\n\\n' }}{%- else -%}{{ '### Response:\\n' +"
    " message['content'] + eos_token + '\\n\\n' }}{%- endif -%}{%- endfor -%}{%- if"
    " add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
BUILT_IN = {"alpaca": ALPACA, "chatml": CHATML}


def choose_template(named: str | None, own: str | None) -> str:
    """Returns the text of the template named in the config (built-in or file), else the tokenizer's
    own, else ALPACA."""
    if named is None:
        return own or ALPACA
    if named in BUILT_IN:
        return BUILT_IN[named]
    path = Path(named)
    if not path.is_file():
        raise ConfigError(
            f"tokenizer.chat_template: {named} is neither a built-in template"
            f" ({', '.join(BUILT_IN)}) nor a file."
        )
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8")
        # Compile it, because parsing alone does not find an unknown filter.
        Environment(extensions=["jinja2.ext.loopcontrols"]).compile(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"tokenizer.chat_template: {named} is not UTF-8 (byte {error.start}). Save it as UTF-8."
        ) from None
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"tokenizer.chat_template: {named}:{error.lineno}: not a Jinja template:"
            f" {error.message}. Fix it."
        ) from None
    return text


@contextlib.contextmanager
def rendering(where: str) -> Iterator[None]:
    """Turns any error of a chat template, which is a program, into a DataError that names the place
    in the data."""
    from jinja2 import TemplateError

    try:
        yield
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise DataError(
            f"{where}: the chat template refuses the conversation: {first_line(error)} Name another"
            " with tokenizer.chat_template."
        ) from None


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids that can end a turn: special tokens, and added ones that are not white space
    (Gemma adds newlines)."""
    return set(tokenizer.all_special_ids) | {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content.strip()
    }


class ChatEncoder:
    """Turns conversations into token ids with a response mask. Needs a fast tokenizer with a chat
    template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.special_ids = np.array(sorted(marker_ids(tokenizer)), dtype=np.int64)

    def encode(
        self, conversations: list[tuple[Message, ...]], places: list[str]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]] | str]:
        """Returns, for each conversation, its (N,) token ids and (N,) mask, or the reason why it
        cannot be trained on.

        Raises DataError if the template breaks the rules: a rendered beginning is not a prefix of
        the whole, or there is no end-of-turn token.
        """
        rendered = self._render(conversations, places, generation_prompt=False)
        spans = self._assistant_spans(conversations, places, rendered)
        encoded = self.tokenizer(
            rendered,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        return [
            self._mask(
                np.array(ids, dtype=np.int32),
                np.array(offsets, dtype=np.int64).reshape(-1, 2),
                text_spans,
                place,
            )
            for ids, offsets, text_spans, place in zip(
                encoded["input_ids"], encoded["offset_mapping"], spans, places, strict=True
            )
        ]

    def _render(
        self,
        conversations: list[tuple[Message, ...]],
        places: list[str],
        *,
        generation_prompt: bool,
    ) -> list[str]:
        with rendering(places[0] if len(places) == 1 else f"{places[0]} to {places[-1]}"):
            return list(
                self.tokenizer.apply_chat_template(
                    [list(messages) for messages in conversations],
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )

    def _assistant_spans(
        self, conversations: list[tuple[Message, ...]], places: list[str], rendered: list[str]
    ) -> list[list[tuple[int, int]]]:
        """Returns the [start, stop) character ranges of the assistant's turns, what follows the
        end-of-turn token included."""
        turns = [
            (row, index)
            for row, messages in enumerate(conversations)
            for index, m in enumerate(messages)
            if m["role"] == "assistant"
        ]
        prompts = self._render(
            [conversations[r][:i] for r, i in turns],
            [places[r] for r, _ in turns],
            generation_prompt=True,
        )
        # The last turn ends with the text, so the common single-turn case needs no third rendering.
        inner = [(r, i) for r, i in turns if i + 1 < len(conversations[r])]
        ends = dict(
            zip(
                inner,
                (
                    self._render(
                        [conversations[r][: i + 1] for r, i in inner],
                        [places[r] for r, _ in inner],
                        generation_prompt=False,
                    )
                    if inner
                    else []
                ),
                strict=True,
            )
        )
        spans: list[list[tuple[int, int]]] = [[] for _ in conversations]
        for (row, index), prompt in zip(turns, prompts, strict=True):
            whole = rendered[row]
            until = ends.get((row, index), whole)
            for name, prefix in (("the prompt before", prompt), ("the text up to", until)):
                if not whole.startswith(prefix):
                    at = next(
                        n
                        for n, (a, b) in enumerate(zip(prefix + "\0", whole + "\1", strict=False))
                        if a != b
                    )
                    raise DataError(
                        f"{places[row]}: the chat template renders {name} turn {index + 1}"
                        f" differently alone and inside the conversation (from character {at}:"
                        f" {prefix[at : at + 20]!r} against {whole[at : at + 20]!r}), so the"
                        " response mask cannot be derived. Name a template that writes every turn"
                        " the same way (tokenizer.chat_template)."
                    )
            content = conversations[row][index]["content"].strip()
            if content not in whole[len(prompt) : len(until)]:
                raise DataError(
                    f"{places[row]}: the chat template does not render the assistant's text of turn"
                    f" {index + 1}. Name another with tokenizer.chat_template."
                )
            spans[row].append((len(prompt), len(until)))
        return spans

    def _mask(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        spans: list[tuple[int, int]],
        place: str,
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]] | str:
        mask = np.zeros(len(ids), dtype=bool)
        special = np.isin(ids, self.special_ids)
        for start, stop in spans:
            wide = offsets[:, 1] > offsets[:, 0]
            touching = wide & (offsets[:, 1] > start) & (offsets[:, 0] < stop)
            inside = wide & (offsets[:, 0] >= start) & (offsets[:, 1] <= stop)
            if (touching & ~inside).any():
                return "a token reaches over the border between prompt and response"
            ends = np.flatnonzero(inside & special)
            if not len(ends):
                raise DataError(
                    f"{place}: the chat template writes no end-of-turn token after the assistant's"
                    " text, so the model would never learn to stop. Name a template that writes"
                    " one (tokenizer.chat_template)."
                )
            inside[ends[-1] + 1 :] = False
            mask |= inside
        if not mask.any():
            return "no response token"
        if mask[0]:
            raise DataError(
                f"{place}: the chat template renders nothing before the response (all {len(mask)}"
                " tokens would carry loss), but its first token must be predicted from something."
                " Name another with tokenizer.chat_template."
            )
        return ids, mask
