"""Writes answers in batches, by transformers or by vLLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sftmix.config.schema import TEMPLATE_DATE
from sftmix.data.template import at_date
from sftmix.data.tokenizer import tokenizer_from, with_template
from sftmix.errors import ConfigError
from sftmix.evaluation.models import load_for_generation, sampling_of


@dataclass(frozen=True)
class Answer:
    """An answer. end: `stop` (the model ended it), `length` (cut at the most tokens), or `no room`
    (the prompt alone fills the context)."""

    text: str
    end: str


class Writer(ABC):
    """A model that answers. batch_size: prompts that it takes at once, if no number is given.
    context: most tokens of a prompt with its answer; None for no limit."""

    batch_size: int
    _tokenizer: Any

    @property
    @abstractmethod
    def context(self) -> int | None:
        """Most tokens of a prompt with its answer."""

    @abstractmethod
    def _write(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> Iterable[Answer]:
        """Returns an answer per prompt; each leaves room for one."""

    def prompt_ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """Returns the tokens of a conversation, up to where the answer begins. A template that
        reads the clock is told the day that it is told in training, unless that was set, so that
        the same answers come on every day.

        Raises ConfigError if the template refuses it.
        """
        from jinja2 import TemplateError

        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                list(turns),
                chat_template=at_date(self._tokenizer.get_chat_template(), TEMPLATE_DATE),
                add_generation_prompt=True,
                return_dict=True,
            )
        except TemplateError as error:
            raise ConfigError(f"The chat template refuses a conversation: {error}.") from None
        return list(encoded["input_ids"])

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
        fits = [self.context is None or len(prompt) < self.context for prompt in prompts]
        rows = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        written = iter(self._write(rows, max_new_tokens, temperature, seed) if rows else ())
        return [next(written) if fit else Answer("", "no room") for fit in fits]


class TransformersWriter(Writer):
    """transformers' `generate`, prompts padded on the left."""

    batch_size = 16

    def __init__(self, source: str):
        self._tokenizer, self._model = load_for_generation(source)
        self._tokenizer.padding_side = "left"

    @property
    def context(self) -> int | None:
        """The positions that the model has."""
        return getattr(self._model.config, "max_position_embeddings", None)

    def _write(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> Iterable[Answer]:
        import torch

        room = max_new_tokens
        if self.context is not None:
            room = min(room, self.context - max(map(len, prompts)))
        padded = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        padded = padded.to(self._model.device)
        torch.manual_seed(seed)
        tokens = self._model.generate(
            **padded,
            max_new_tokens=room,
            pad_token_id=self._tokenizer.pad_token_id,
            **sampling_of(temperature),
        )[:, padded["input_ids"].shape[1] :]
        return map(self._read, tokens.tolist())

    def _read(self, tokens: list[int]) -> Answer:
        stops = self._model.generation_config.eos_token_id
        stops = {stops} if isinstance(stops, int) else set(stops or ())
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Answer(str(text).strip(), "length" if end is None else "stop")


class VllmWriter(Writer):
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

    @property
    def context(self) -> int | None:
        """The length that the engine was started with."""
        return int(self._engine.llm_engine.model_config.max_model_len)

    def _write(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> Iterable[Answer]:
        if temperature is None:
            parameters = self._engine.get_default_sampling_params()
            parameters.max_tokens, parameters.seed = max_new_tokens, seed
        else:
            parameters = self._parameters(
                temperature=temperature, max_tokens=max_new_tokens, seed=seed
            )
        rows = [{"prompt_token_ids": prompt} for prompt in prompts]
        for found in self._engine.generate(rows, parameters):
            completion = found.outputs[0]
            yield Answer(completion.text.strip(), str(completion.finish_reason))


WRITERS: dict[str, type[TransformersWriter] | type[VllmWriter]] = {
    "transformers": TransformersWriter,
    "vllm": VllmWriter,
}
