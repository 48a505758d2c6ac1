"""AlpacaEval's comparison with a reference model: prompts, order, verdicts and win rates are those
of the package alpaca_eval; the endpoint is ours."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from sftmix.errors import ArtifactError, ConfigError
from sftmix.evaluation.judges.endpoint import MISSING, Endpoint, Request
from sftmix.evaluation.judges.questions import Questions

NUM_INSTRUCTIONS = 805  # of AlpacaEval; the length-controlled rate is defined on all of them


class Annotator:
    """An annotator of alpaca_eval by its name, whose requests go to our endpoint.

    Raises ConfigError if alpaca_eval is not installed or has no such annotator.
    """

    def __init__(self, name: str):
        try:
            with quiet():
                from alpaca_eval.annotators import PairwiseAnnotator

                # its own cache of verdicts would stand in the installed package
                self._pool = PairwiseAnnotator(
                    annotators_config=name, caching_path=None, is_avoid_reannotations=False
                )
        except ImportError:
            raise ConfigError(MISSING) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"--annotator {name}: alpaca_eval cannot load it: {error}") from None
        self.name = name

    def requests(self, reference: Rows, outputs: Rows) -> list[Request]:
        """Returns what the judge would be asked."""
        asked: list[Request] = []

        def note(prompts: Sequence[str], **parameters: Any) -> dict[str, Any]:
            asked.extend(_request(prompt, parameters) for prompt in prompts)
            return _completions([{"text": "", "logprobs": None} for _ in prompts])

        with quiet():
            self._annotate(reference, outputs, note)
        return asked

    def judge(
        self, endpoint: Endpoint, reference: Rows, outputs: Rows, title: str
    ) -> list[dict[str, Any]]:
        """Returns alpaca_eval's annotations, in the order of the outputs. `preference`: 1 (the
        reference is better) to 2 (the output is), None for no verdict."""

        def complete(prompts: Sequence[str], **parameters: Any) -> dict[str, Any]:
            return _completions(
                endpoint.ask([_request(prompt, parameters) for prompt in prompts], title)
            )

        with quiet():
            found: list[dict[str, Any]] = self._annotate(reference, outputs, complete)
        # win rates by instruction stand on this
        if [row["instruction"] for row in found] != [row["instruction"] for row in outputs]:
            raise ArtifactError("alpaca_eval has returned the instructions in another order.")
        for row in found:
            if row["preference"] is not None and math.isnan(row["preference"]):
                row["preference"] = None
        return found

    def _annotate(self, reference: Rows, outputs: Rows, complete: Any) -> Any:
        for each in self._pool.annotators.values():
            each.fn_completions = complete
        return self._pool.annotate_head2head(
            outputs_1=list(reference), outputs_2=list(outputs), chunksize=None
        )


Rows = Sequence[Mapping[str, Any]]


def _request(prompt: str, parameters: Mapping[str, Any]) -> Request:
    from alpaca_eval.utils import prompt_to_chatml

    kept = {key: value for key, value in parameters.items() if key != "model_name"}
    return Request(prompt_to_chatml(prompt), {"max_tokens": 100, **kept})


def _completions(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns answers in the form of alpaca_eval's decoders."""
    return {
        "completions": [answer["text"] or " " for answer in answers],
        "completions_all": [
            {"text": answer["text"] or " ", "logprobs": answer["logprobs"] or {"content": []}}
            for answer in answers
        ],
        "price_per_example": [0.0] * len(answers),
        "time_per_example": [0.0] * len(answers),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """alpaca_eval sets the root logger to INFO when it is imported, and logs every call."""
    root = logging.getLogger()
    level = root.level
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)


def rows_of(questions: Questions, answers: Mapping[str, Sequence[str]], name: str) -> Rows:
    """Returns a model's answers as alpaca_eval's outputs, in the order of the questions."""
    return [
        {
            "instruction": row.row["instruction"],
            "output": answers[row.item][0],
            "generator": name,
            "dataset": row.row.get("dataset", ""),
        }
        for row in questions.rows
    ]


def win_rates(
    annotations: Sequence[Mapping[str, Any]], gamed: Path | None
) -> tuple[dict[str, float], str | None]:
    """Returns alpaca_eval's win rates in per cent, without annotations that have no verdict, and
    why the length-controlled one is not among them; None where it is.

    gamed: alpaca_eval's `df_gamed.csv`, which its model of lengths is fitted with; None for the
    one on the Hub.
    """
    from alpaca_eval import metrics
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # `index` is the instruction's place in AlpacaEval, by which its difficulty is found
    judged = [dict(row) for row in annotations if row["preference"] is not None]
    if not judged:
        return {}, "the judge gave no verdict"
    rates = {key: float(value) for key, value in metrics.get_winrate(judged).items()}
    if len(judged) < NUM_INSTRUCTIONS:
        return rates, (
            f"{len(judged)} of AlpacaEval's {NUM_INSTRUCTIONS} instructions have a verdict, and"
            " it is defined on all"
        )
    local = (
        contextlib.nullcontext()
        if gamed is None
        else mock.patch.object(metrics.glm_winrate, "hf_hub_download", lambda **_: str(gamed))
    )
    try:
        with quiet(), local:
            found = metrics.get_length_controlled_winrate(judged, save_weights_dir=None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        return rates, (
            f"df_gamed.csv of tatsu-lab/alpaca_eval cannot be had ({type(error).__name__}); give it"
            " with --length-data FILE"
        )
    return {key: float(value) for key, value in found.items()}, None
