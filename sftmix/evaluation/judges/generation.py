"""Writes answers in batches, by transformers or by vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sftmix.data.tokenizer import tokenizer_from, with_template
from sftmix.errors import ConfigError
from sftmix.evaluation.models import load_for_generation


@dataclass(frozen=True)
class Answer:
    """An answer. end: `stop` (the model ended it), `length` (cut at the most tokens), or `no room`
    (the prompt alone fills the context)."""

    text: str
    end: str


class Writer(Protocol):
    """A model that answers. batch_size: prompts that it takes at once, if no number is given."""

    batch_size: int

    def prompt_ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation, up to where the answer begins."""

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> list[Answer]:
        """Returns an answer per prompt. temperature: 0 is greedy; None samples as the model's own
        generation settings say. The same batch and seed have the same answers."""


def prompt_ids(tokenizer: Any, turns: Sequence[dict[str, str]]) -> list[int]:
    """Returns the tokens of a conversation by the tokenizer's template.

    Raises ConfigError if the template refuses it.
    """
    from jinja2 import TemplateError

    try:
        encoded: Any = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, return_dict=True
        )
    except TemplateError as error:
        raise ConfigError(f"The chat template refuses a conversation: {error}.") from None
    return list(encoded["input_ids"])


class TransformersWriter:
    """transformers' `generate`, prompts padded on the left."""

    batch_size = 16

    def __init__(self, source: str):
        self._tokenizer, self._model = load_for_generation(source)
        self._tokenizer.padding_side = "left"

    def prompt_ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation, up to where the answer begins."""
        return prompt_ids(self._tokenizer, turns)

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> list[Answer]:
        """Returns an answer per prompt (`Writer.answer`)."""
        import torch

        context = getattr(self._model.config, "max_position_embeddings", None)
        fits = [context is None or len(prompt) < context for prompt in prompts]
        rows = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        written: Iterator[Answer] = iter(())
        if rows:
            room = max_new_tokens if context is None else context - max(map(len, rows))
            padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            padded = padded.to(self._model.device)
            sampling: dict[str, Any] = {}
            if temperature is not None:
                sampling = {"do_sample": temperature > 0}
                if temperature > 0:
                    sampling["temperature"] = temperature
            torch.manual_seed(seed)
            tokens = self._model.generate(
                **padded,
                max_new_tokens=min(max_new_tokens, room),
                pad_token_id=self._tokenizer.pad_token_id,
                **sampling,
            )[:, padded["input_ids"].shape[1] :]
            written = map(self._read, tokens.tolist())
        return [next(written) if fit else Answer("", "no room") for fit in fits]

    def _read(self, tokens: list[int]) -> Answer:
        stops = self._model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops or ())
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Answer(str(text).strip(), "length" if end is None else "stop")


class VllmWriter:
    """vLLM's offline engine, with its own batching and the model's own stop tokens."""

    batch_size = 256

    def __init__(self, source: str):
        try:
            from vllm import LLM, SamplingParams
        except ImportError:
            raise ConfigError(
                "--backend vllm: vLLM is not installed. Install it, or leave --backend out."
            ) from None
        self._tokenizer = with_template(tokenizer_from(source), None)
        self._engine, self._parameters = LLM(model=source), SamplingParams

    def prompt_ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation, up to where the answer begins."""
        return prompt_ids(self._tokenizer, turns)

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> list[Answer]:
        """Returns an answer per prompt (`Writer.answer`)."""
        if temperature is None:
            parameters = self._engine.get_default_sampling_params()
            parameters.max_tokens, parameters.seed = max_new_tokens, seed
        else:
            parameters = self._parameters(
                temperature=temperature, max_tokens=max_new_tokens, seed=seed
            )
        context = self._engine.llm_engine.model_config.max_model_len
        fits = [len(prompt) < context for prompt in prompts]
        rows = [
            {"prompt_token_ids": prompt} for prompt, fit in zip(prompts, fits, strict=True) if fit
        ]
        found = iter(self._engine.generate(rows, parameters) if rows else ())
        answers = []
        for fit in fits:
            if not fit:
                answers.append(Answer("", "no room"))
                continue
            completion = next(found).outputs[0]
            answers.append(Answer(completion.text.strip(), str(completion.finish_reason)))
        return answers


WRITERS: dict[str, type[TransformersWriter] | type[VllmWriter]] = {
    "transformers": TransformersWriter,
    "vllm": VllmWriter,
}
