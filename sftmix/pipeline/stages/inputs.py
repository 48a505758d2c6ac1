"""Inputs that several stages read: the data stage, and models of earlier stages."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sftmix.batches.examples import TokenisedExamples
from sftmix.config.schema import ModelConfig
from sftmix.data.tokenizer import tokenizer_from
from sftmix.pipeline.context import StageContext


def read_examples(context: StageContext, part: str = "train") -> TokenisedExamples:
    """Returns the examples of the data stage. part: "train" or "held_out"."""
    return TokenisedExamples(context.inputs["data"] / f"{part}.arrow")


def read_tokenizer(context: StageContext) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the data stage, with its chat template."""
    return tokenizer_from(context.inputs["data"] / "tokenizer")


def trained_model(start: ModelConfig, folder: Path) -> ModelConfig:
    """Returns the model in `folder`, trained from `start`, with the other settings of `start`
    (attention, trust). Adapters are already merged."""
    return start.model_copy(
        update={"path": str(folder), "architecture": None, "revision": None, "lora": None}
    )


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a model that was exported after a step."""
    return f"step_{step:06d}"
