"""Loads a tokenizer, or trains a SentencePiece one, with the chat template of the run."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.config.schema import Config, TokenizerTrainConfig
from sftmix.data.conversations import Example
from sftmix.data.template import choose_template, rendering
from sftmix.errors import ConfigError, DataError, first_line
from sftmix.storage.failures import accessing
from sftmix.storage.files import read_record, sha256_of_file
from sftmix.storage.provenance import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers raises for a folder with a missing, damaged or wrong file.
NOT_LOADED = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Returns the tokenizer named in the config, with the chat template chosen. Raises
    ConfigError."""
    source = config.tokenizer_source
    assert source is not None, "the config trains its tokenizer"
    tokenizer = tokenizer_from(
        source,
        revision=config.model.revision if source == config.model.path else None,
        trust_remote_code=config.model.trust_remote_code,
    )
    return with_template(tokenizer, config.tokenizer.chat_template)


def tokenizer_from(source: str | Path, **options: object) -> PreTrainedTokenizerBase:
    """Returns the fast tokenizer of a folder or Hub name. Raises ConfigError if there is none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), use_fast=True, **options)
    except BaseException as error:
        if (
            not isinstance(error, (*NOT_LOADED, StrictDataclassError))
            and type(error) is not Exception
        ):  # raised by the package tokenizers
            raise
        raise ConfigError(
            f"tokenizer: {source} cannot be loaded: {why_not_loaded(source, error)} Give a folder"
            " with tokenizer files in tokenizer.path, or train one with tokenizer.train."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer: {source} has no fast version, which the response mask needs (character"
            " offsets)."
        )
    return tokenizer


def why_not_loaded(source: str | Path, error: BaseException) -> str:
    """Returns why transformers could not load a folder, as a sentence: a file that is not a JSON
    object, else the text of the error."""
    for path in sorted(Path(source).glob("*.json")) if Path(source).is_dir() else []:
        with contextlib.suppress(OSError):
            if path.exists() and read_record(path) is None:
                return f"{path} is damaged: it holds no JSON object."
    return first_line(error.__cause__ or error)


def with_template(tokenizer: PreTrainedTokenizerBase, named: str | None) -> PreTrainedTokenizerBase:
    """Sets the chat template of the run, and a padding token where there is none. Returns the
    tokenizer."""
    tokenizer.chat_template = choose_template(named, tokenizer.chat_template)
    if tokenizer.eos_token is None:
        raise ConfigError(
            "tokenizer: it has no end-of-sequence token, so no response could ever end. Set"
            " eos_token in its files."
        )
    if tokenizer.pad_token is None:
        # padding is always masked out
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the chat template; of several, all of them with their names."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def render_for_training(examples: list[Example], template: str) -> list[str]:
    """Returns the rendered conversations without special tokens, as text to train a tokenizer
    on."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts = []
    for example in examples:
        if example.is_text:
            texts.append(example.messages[0]["content"])
            continue
        with rendering("training examples"):
            rendered: Any = render_jinja_template(
                [list(example.messages)],
                tools=list(example.tools) or None,
                chat_template=template,
                bos_token="",
                eos_token="",
            )
        texts += rendered[0]
    return texts


def train_tokenizer(
    texts: Iterable[str], settings: TokenizerTrainConfig, folder: Path
) -> PreTrainedTokenizerBase:
    """Trains a SentencePiece model with byte fallback (no text is unknown) and returns it as a
    Llama tokenizer.

    `folder` receives the SentencePiece model as `tokenizer.model`. Raises DataError if the data is
    too small for the vocabulary.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()  # SentencePiece does not report a full disk
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=settings.vocab_size,
            model_type=settings.model_type,
            byte_fallback=True,
            character_coverage=0.9995,
            input_sentence_size=1_000_000,
            shuffle_input_sentence=True,
            max_sentence_length=1 << 16,
            num_threads=1,  # with two threads the merges are not deterministic
            split_digits=True,
            add_dummy_prefix=False,  # keeps words after a line break apart from words after a space
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"the SentencePiece tokenizer cannot be trained: {' '.join(str(error).split())[-200:]} "
            f"Lower tokenizer.train.vocab_size (now {settings.vocab_size}), or use more data."
        ) from None
    with accessing(folder / "tokenizer.model"):
        (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), legacy=False, add_prefix_space=False)
    tokenizer.pad_token = "<pad>"
    return tokenizer


def tokenizer_identity(config: Config) -> str:
    """Returns a hash that changes with the tokenizer's files, or with its training settings and
    template."""
    template = fingerprint(choose_template(config.tokenizer.chat_template, "own"))
    source = config.tokenizer_source
    if source is None:
        assert config.tokenizer.train is not None, "no source means a trained tokenizer"
        return fingerprint([config.tokenizer.train.model_dump(), template])
    folder = Path(source)
    if not folder.is_dir():
        return fingerprint([source, config.model.revision, template])
    files = sorted(
        {
            path
            for pattern in TOKENIZER_FILES
            for path in folder.glob(pattern)
            if "safetensors" not in path.name
        }
    )
    return fingerprint([{path.name: sha256_of_file(path) for path in files}, template])
