"""`sftmix inspect`: examples as the model will see them, tokens coloured by the response mask."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftmix.batches.examples import TokenisedExamples
from sftmix.config.schema import Config
from sftmix.data.prepare import prepare
from sftmix.data.tokenizer import tokenizer_from
from sftmix.errors import counted

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


def inspect(config: Config, *, num_examples: int) -> None:
    """Prints the counts of the data stage, the share of truncated examples, and examples token by
    token.

    Runs the data stage in a temporary folder, so the run folder is not changed. Raises what the
    data stage raises.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        summary, *_ = prepare(config, folder)
        tokenizer = tokenizer_from(folder / "tokenizer")
        examples = TokenisedExamples(folder / "train.arrow")
        total = summary.num_train + summary.num_held_out
        for line in (
            *summary.lines(),
            f"{summary.num_truncated / total:.1%} truncated to"
            f" {counted(config.data.max_length, 'token')}",
            f"tokens per example: median {int(np.median(examples.num_tokens))}, longest"
            f" {int(examples.num_tokens.max())}",
            "\ntokens that carry loss are [bold green]green[/] (>> << without colours); | separates"
            " tokens",
        ):
            console.print(line)
        for index in range(min(num_examples, len(examples))):
            ids, mask = examples.tokens(index)
            place = examples.table[index]["place"]
            share = f"loss on {int(mask.sum())} of {counted(len(ids), 'token')}"
            console.print(
                f"\n{examples.example_ids[int(index)].as_py()}  {place}  {share}", style="bold"
            )
            console.print(
                coloured(tokenizer, ids.tolist(), mask.tolist(), with_marks=not console.is_terminal)
            )


def coloured(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    mask: list[bool],
    *,
    with_marks: bool = False,
) -> Text:
    """Returns the tokens as rich text, green where they carry loss (and between >> and <<
    `with_marks`); whitespace is made visible."""
    from rich.text import Text

    text = Text()
    was_trained = False
    for token, carries_loss in zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True):
        shown = (
            str(token)
            .replace("\u2581", "\u00b7")
            .replace("\n", "\u21b5")
            .replace("\u0120", "\u00b7")
            .replace("\u010a", "\u21b5")
            .replace("<0x0A>", "\u21b5")
        )
        if with_marks and carries_loss != was_trained:
            text.append(">>" if carries_loss else "<<")
            was_trained = carries_loss
        text.append(shown, style="bold green" if carries_loss else "dim")
        text.append("|", style="dim blue")
        if shown.endswith("\u21b5"):
            text.append("\n")
    if with_marks and was_trained:
        text.append("<<")
    return text
