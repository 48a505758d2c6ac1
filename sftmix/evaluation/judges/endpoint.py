"""An OpenAI-compatible endpoint: retries, time limits, and answers that are paid for once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.errors import ConfigError, MachineError, counted, first_line
from sftmix.evaluation.judges.journal import Journal
from sftmix.storage import provenance

CHARACTERS_PER_TOKEN = 4  # of English text, roughly; for the price before it is spent
MISSING = (
    "The judge needs openai and alpaca_eval, which are not installed. Install them: pip install"
    " 'sftmix[eval]'."
)


@dataclass(frozen=True)
class Request:
    """A question to the judge. parameters: of the chat completion, `max_tokens` among them.
    attempt: number of times that it was asked before without a usable answer."""

    messages: Sequence[Mapping[str, str]]
    parameters: Mapping[str, Any]
    attempt: int = 0


@dataclass(frozen=True)
class Spent:
    """What a judge has answered: under which names, and tokens read and written, as it says."""

    models: set[str | None]
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Price:
    """USD per million tokens; None where the user gave none."""

    prompt: float | None
    answer: float | None

    def of(self, prompt_tokens: float, answer_tokens: float) -> float | None:
        """Returns USD for so many tokens."""
        if self.prompt is None or self.answer is None:
            return None
        return (prompt_tokens * self.prompt + answer_tokens * self.answer) / 1e6


class Endpoint:
    """A judge behind an OpenAI-compatible endpoint.

    url: up to `/v1`; None for OpenAI's. model: its name there. key: environment variable with the
    API key; the key is written nowhere. cache: file that keeps every answer, so that none is asked
    for twice. timeout: seconds for one answer. retries: after failures that may pass.

    Raises ConfigError if the variable is not set, or if openai is not installed.
    """

    def __init__(
        self,
        url: str | None,
        model: str,
        *,
        key: str,
        cache: Path,
        timeout: float,
        retries: int,
        parallel: int,
    ):
        try:
            import openai
        except ImportError:
            raise ConfigError(MISSING) from None
        secret = os.environ.get(key)
        if not secret:
            raise ConfigError(
                f"The environment variable {key} is not set. It holds the endpoint's key; where"
                " none is needed, any text will do. Another variable: --key-variable NAME."
            )
        self.model, self._parallel, self._retries = model, parallel, retries
        self._where = url or "https://api.openai.com/v1"
        self._client = openai.OpenAI(
            base_url=self._where, api_key=secret, timeout=timeout, max_retries=retries
        )
        # of other endpoints the same name may be another model; the address itself is not written
        self._journal = Journal(cache, {"model": model, "endpoint": provenance.fingerprint(url)})
        self._known = {row["request"]: row for row in self._journal.rows}

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Returns the requests that have no answer yet."""
        return [request for request in requests if self._id(request) not in self._known]

    def estimate(self, requests: Sequence[Request]) -> tuple[int, int]:
        """Returns tokens of the prompts, by their characters, and the most tokens of the
        answers."""
        asked = sum(len(message["content"]) for request in requests for message in request.messages)
        answered = sum(int(request.parameters["max_tokens"]) for request in requests)
        return asked // CHARACTERS_PER_TOKEN, answered

    def ask(self, requests: Sequence[Request], title: str) -> list[dict[str, Any]]:
        """Returns an answer per request: `text` (None for none), `logprobs`, `model`,
        `prompt_tokens`, `answer_tokens`, as the endpoint says them.

        Raises MachineError if the endpoint does not answer; what it did answer is kept.
        """
        from tqdm import tqdm

        left = list({self._id(request): request for request in self.missing(requests)}.values())
        pool = ThreadPoolExecutor(self._parallel)
        try:
            with tqdm(total=len(left), desc=title, unit="answer", file=sys.stderr) as progress:
                for _ in pool.map(self._answer, left):
                    progress.update()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [self._known[self._id(request)] for request in requests]

    def spent(self) -> Spent:
        """Returns what all answers have cost so far, those of earlier starts included."""
        rows = self._journal.rows
        return Spent(
            {row["model"] for row in rows},
            sum(row["prompt_tokens"] for row in rows),
            sum(row["answer_tokens"] for row in rows),
        )

    def _id(self, request: Request) -> str:
        return provenance.fingerprint(
            [list(request.messages), dict(request.parameters), request.attempt]
        )

    def _answer(self, request: Request) -> None:
        import openai

        try:
            for _ in range(self._retries + 1):
                found = self._client.chat.completions.create(
                    model=self.model,
                    messages=list(request.messages),  # type: ignore[arg-type]
                    **request.parameters,
                )
                if isinstance(getattr(found, "choices", None), list) and found.choices:
                    break
            else:  # a page of a proxy, for example, with status 200
                raise ValueError(f"no chat completion, but {str(found)[:80]!r}")
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConfigError(f"{self._where} refuses the key: {first_line(error)}") from None
        except (openai.BadRequestError, openai.NotFoundError) as error:
            raise ConfigError(
                f"{self._where} refuses the request for {self.model}: {first_line(error)}"
            ) from None
        except (openai.APIError, ValueError) as error:  # ValueError: what it sends is no JSON
            raise MachineError(
                f"{self._where} does not answer: {first_line(error)} The answers so far are kept in"
                f" {self._journal.path.parent}; the same command goes on from there."
            ) from None
        row = {"request": self._id(request), **_content(found)}
        self._journal.add([row])
        self._known[row["request"]] = row


def _content(found: Any) -> dict[str, Any]:
    """Returns what is needed of an answer. An endpoint may leave out anything, also what its
    interface promises."""
    message = getattr(found.choices[0], "message", None)
    logprobs = getattr(found.choices[0], "logprobs", None)
    usage = getattr(found, "usage", None)
    text = getattr(message, "content", None)
    return {
        "text": text if isinstance(text, str) else None,
        "logprobs": logprobs.model_dump() if logprobs is not None else None,
        "model": getattr(found, "model", None),
        "prompt_tokens": getattr(usage, "prompt_tokens", None) or 0,
        "answer_tokens": getattr(usage, "completion_tokens", None) or 0,
    }


def announce(endpoint: Endpoint, requests: Sequence[Request], price: Price, *, yes: bool) -> None:
    """Says what the judge will be asked and what that costs, and asks for consent.

    Raises ConfigError without consent: a no, or no terminal and not `yes`.
    """
    left = endpoint.missing(requests)
    if not left:
        return
    asked, answered = endpoint.estimate(left)
    cost = price.of(asked, answered)
    shown = (
        "price unknown (--price PROMPT ANSWER, USD per million tokens)"
        if cost is None
        else f"at most about {cost:.2f} USD"
    )
    kept = len(requests) - len(left)
    print(
        f"{endpoint.model}: {counted(len(left), 'request')}"
        + (f" ({kept:,} more are answered)" if kept else "")
        + f", about {asked:,} tokens of prompts, at most {answered:,} of answers; {shown}",
        flush=True,
    )
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("Nothing was asked. --yes agrees to this; a terminal would ask.")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("Nothing was asked.")
