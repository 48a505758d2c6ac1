"""A tokenizer in which control tokens are written by templates alone.

A special token such as `<s>` or `<|im_end|>` is matched wherever its text stands, so that a line of
HTML ends a turn. In `Escaping` every special token has another name, of characters that no text
has: the ids are the same, the template's control tokens are written by the new names, and the old
names in the texts of users are texts.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from sftmix.data.conversations import BadRow
from sftmix.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE = "\ue000sftmix", "\ue001"  # for private use
NEVER = "(?!)"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the ids of the tokens that are matched as a whole and control the model."""
    added = {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def pattern_of(texts: set[str]) -> re.Pattern[str]:
    """Returns what finds the longest of the texts."""
    ordered = sorted((t for t in texts if t), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or NEVER)


class Escaping:
    """backend: the tokenizer with other names of special tokens; adds none by itself. control:
    finds special tokens in a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        from tokenizers import Tokenizer

        self._ids = special_tokens(tokenizer)
        self.control = pattern_of(set(self._ids))
        names = {text: f"{_OPEN}{number}{_CLOSE}" for text, number in self._ids.items()}
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        self.backend: Tokenizer = Tokenizer.from_str(json.dumps(_renamed(settings, names)))
        self.backend.no_padding()
        self.backend.no_truncation()
        self._names = names
        for text, number in self._ids.items():
            if self.backend.token_to_id(names[text]) != number:
                raise DataError(
                    f"tokenizer: its special token {text!r} has no id of its own, so that it cannot"
                    " be told from the same text in the data. Use another (tokenizer.path)."
                )

    def escape(self, text: str) -> str:
        """Returns a text of the template, its control tokens by their new names."""
        return self.control.sub(lambda match: self._names[match[0]], text)

    def check(self, text: str) -> None:
        """Raises BadRow for a text that holds a new name."""
        if _OPEN in text:
            raise BadRow("it holds a character for private use (U+E000) before `sftmix`")


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Returns a JSON value in which every text and key that is a name is replaced."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    return value
