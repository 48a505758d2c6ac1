"""`sftmix chat`: a conversation with a model in a terminal, or with two models side by side."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from sftmix.errors import ArtifactError, ConfigError, counted
from sftmix.evaluation.models import folder_of, load_for_generation, sampling_of

HELP = "/clear forgets the conversation, /system TEXT sets the system prompt, /quit ends."


class Conversation:
    """A conversation with one model. Each answer continues what was said before.

    model: a Hugging Face folder, a run folder (its SFTMix model), or a Hub name. system: the system
    prompt; None for none. temperature: 0 takes the likeliest token each time; None samples as the
    model's own generation settings say.

    Raises ConfigError for what is no model, or a system prompt that its template does not take.
    """

    def __init__(
        self, model: str, *, system: str | None, max_new_tokens: int, temperature: float | None
    ):
        self.name = model
        self._tokenizer, self._model = load_for_generation(folder_of(model))
        self._sampling = sampling_of(temperature)
        self._max_new_tokens = max_new_tokens
        self.turns: list[dict[str, str]] = []
        self.system = system
        self._prompt_ids([{"role": "user", "content": "."}])  # the template takes the system prompt

    def clear(self) -> None:
        """Forgets what was said."""
        self.turns = []

    def answer(self, text: str) -> Iterator[str]:
        """Yields the answer to a user's turn piece by piece, and keeps both turns. Closed early, it
        stops the model and keeps what was said so far.

        Raises ArtifactError if the turn alone leaves no room for an answer.
        """
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        turns = [*self.turns, {"role": "user", "content": text}]
        ids, num_forgotten = self._fitting(turns)
        if num_forgotten:
            yield f"[{counted(num_forgotten, 'oldest turn')} forgotten: the context is full]\n"
        stopped, failures = threading.Event(), []
        written: list[int] = []
        streamer: Any = TextIteratorStreamer(
            self._tokenizer, skip_prompt=True, skip_special_tokens=True
        )

        def is_stopped(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], stopped.is_set(), device=input_ids.device)

        def generate() -> None:
            try:
                written[:] = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    pad_token_id=self._tokenizer.pad_token_id,
                    max_new_tokens=self._max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([is_stopped]),
                    **self._sampling,
                )[0, ids.shape[1] :].tolist()
            except BaseException as error:
                failures.append(error)
                streamer.end()  # else the reader would wait for ever

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            stopped.set()
            worker.join()
            # from the tokens: pieces of a character that is no valid text yet are shown otherwise
            said = str(self._tokenizer.decode(written, skip_special_tokens=True))
            if not failures:
                self.turns = [*turns[num_forgotten:], {"role": "assistant", "content": said}]
        if failures:
            raise failures[0]

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[Any, int]:
        """Returns the prompt of the newest turns that leave room for an answer, and how many older
        ones do not fit."""
        context = getattr(self._model.config, "max_position_embeddings", None)
        for first in range(0, len(turns), 2):
            ids = self._prompt_ids(turns[first:])
            if context is None or ids.shape[1] + self._max_new_tokens <= context:
                return ids, first
        raise ArtifactError(
            f"{self.name}: this turn has {ids.shape[1]} tokens with its template, and the context"
            f" of {context} leaves no room for {self._max_new_tokens} more. Shorten it, or give a"
            " smaller --max-new-tokens."
        )

    def _prompt_ids(self, turns: Sequence[dict[str, str]]) -> Any:
        from jinja2 import TemplateError

        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                [*system, *turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ConfigError(
                f"{self.name}: its chat template refuses this conversation: {error}."
                + (" Leave the system prompt out." if system else "")
            ) from None
        return encoded["input_ids"].to(self._model.device)


def chat(
    models: Sequence[str], *, system: str | None, max_new_tokens: int, temperature: float | None
) -> None:
    """Talks with one model, or with two side by side, until the input ends. Each line is a turn."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    conversations = [Conversation(model, system=system, **settings) for model in models]
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        print(f"{HELP} Control-C stops an answer.")
    for text in _lines(is_terminal):
        command, _, argument = text.partition(" ")
        if not text:
            continue
        if command == "/quit":
            return
        if command == "/clear":
            for each in conversations:
                each.clear()
        elif command == "/system":
            for each in conversations:
                each.system = argument or None
        elif command.startswith("/"):
            print(f"{command} is no command. {HELP}")
        else:
            try:
                if len(conversations) > 1 and is_terminal:
                    _show_beside(conversations, text)
                else:
                    _show(conversations, text)
            except (ArtifactError, ConfigError) as error:
                print(f"sftmix: {error}")


def _lines(is_terminal: bool) -> Iterator[str]:
    if is_terminal:
        import readline  # noqa: F401  # arrow keys and earlier lines
    while True:
        try:
            yield input("you> " if is_terminal else "").strip()
        except EOFError:
            return


def _show(conversations: Sequence[Conversation], text: str) -> None:
    for each in conversations:
        print(f"{each.name}> " if len(conversations) > 1 else "", end="", flush=True)
        answer = each.answer(text)
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            answer.close()  # type: ignore[attr-defined]
            print(" [stopped]", end="")
        print(flush=True)


def _show_beside(conversations: Sequence[Conversation], text: str) -> None:
    """Shows the answers in columns, as both models write them."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    shown = [Text() for _ in conversations]
    answers = [each.answer(text) for each in conversations]
    table = Table(expand=True)
    for each in conversations:
        table.add_column(each.name, ratio=1, overflow="fold")
    table.add_row(*shown)
    with Live(table, vertical_overflow="visible"):
        writing = dict(enumerate(answers))
        try:
            while writing:
                for number, answer in list(writing.items()):
                    piece = next(answer, None)
                    if piece is None:
                        del writing[number]
                    else:
                        shown[number].append(piece)
        except KeyboardInterrupt:
            for answer in answers:
                answer.close()  # type: ignore[attr-defined]
