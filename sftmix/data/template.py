"""Chat templates: which one a run uses, and how one is rendered."""

from __future__ import annotations

import contextlib
import datetime
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sftmix.data.conversations import BadRow
from sftmix.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# part of the data fingerprint: increase it when masks change
MASK_POLICY = "assistant-turns-with-end-of-turn/2"
_CLOCK = re.compile(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")

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


@functools.lru_cache(maxsize=8)  # for every conversation, of one or two templates
def at_date(template: str, date: str) -> str:
    """Returns a template that reads `date` (ISO 8601) wherever it reads the clock, so that the same
    data gives the same tokens on every day.

    Raises DataError for a format of the date that is not a text.
    """
    day = datetime.date.fromisoformat(date)
    dated = _CLOCK.sub(lambda match: repr(day.strftime(match[2])), template)
    if reads_clock(dated):
        raise DataError(
            "tokenizer.chat_template: it reads the clock with a format that is not a text in the"
            " template, so that its date cannot be fixed. Write the format into strftime_now(...)."
        )
    return dated


def reads_clock(template: str) -> bool:
    return bool(re.search(r"strftime_now\s*\(", template))


@contextlib.contextmanager
def rendering(where: str | None = None) -> Iterator[None]:
    """Turns any error of a chat template, which is a program, into a DataError that names the place
    in the data, or into a BadRow without one."""
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
        if isinstance(error, BadRow):
            raise
        problem = f"the chat template refuses the conversation: {first_line(error)}"
        if where is None:
            raise BadRow(problem) from None
        raise DataError(f"{where}: {problem} Name another with tokenizer.chat_template.") from None


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids that can end a turn: special tokens, and added ones that are not white space
    (Gemma adds newlines)."""
    return set(tokenizer.all_special_ids) | {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content.strip()
    }
