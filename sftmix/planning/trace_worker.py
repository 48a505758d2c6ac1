"""Traces one step in a world that is not there. Arguments: a file with a request of `traces.py`,
and one to write the trace to."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sftmix.batches.collate import MicroBatch
from sftmix.batches.cut import StepCounts
from sftmix.config.schema import Config
from sftmix.engine import loading
from sftmix.engine.fake_world import Trace, join_fake_world, trace, without_contents

DOCUMENTS = 2  # one pair
RESPONSE_SHARE = 0.5


def main() -> None:
    gc.disable()  # the process is short, and collections take a tenth of its time
    given, made = map(Path, sys.argv[1:])
    request = json.loads(given.read_text(encoding="utf-8"))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request["deepspeed"], file)
        file.flush()
        if request["deepspeed"]:
            request["config"]["engine"]["deepspeed"] = file.name
        made.write_text(json.dumps(_trace(request)), encoding="utf-8")


def _trace(request: dict[str, Any]) -> dict[str, Any]:
    config = Config.model_validate(request["config"])
    settings = loading.hf_config(config.model, needs_weights=False)
    if request["depth"] is not None:
        _cut_layers(settings, request["depth"])
    batch, counts, shape = equal_pair(request["max_tokens"], settings)
    ranks = join_fake_world(request["world_size"])
    with without_contents(settings):
        found = trace(config, ranks, batch, counts)
    return as_json(found, shape, request["world_size"])


def as_json(found: Trace, shape: dict[str, int], world_size: int) -> dict[str, Any]:
    """Returns what `traces.Trace` reads. shape: of `equal_pair`."""
    return {
        **shape,
        "world_size": world_size,
        "num_parameters": found.num_parameters,
        "num_trained_parameters": found.num_trained_parameters,
        "packs": found.packs,
        "one": found.one.as_json(),
        "two": found.two.as_json(),
    }


def equal_pair(max_tokens: int, settings: Any) -> tuple[MicroBatch, StepCounts, dict[str, int]]:
    """Returns a micro-batch of two equal examples of at most `max_tokens` in all, the counts of its
    step, and its shape for a `Trace`. settings: transformers config of the model, none of whose
    numbers divides the examples."""
    sizes = _sizes(settings.to_dict())
    length = _prime_below(max(8, max_tokens // DOCUMENTS), sizes)
    response = _prime_below(max(5, int(length * RESPONSE_SHARE)), sizes)
    shape = {
        "tokens": DOCUMENTS * length,
        "responses": DOCUMENTS * response,
        "documents": DOCUMENTS,
        "vocab_size": settings.get_text_config().vocab_size,
    }
    return pair_of(length, response), StepCounts(DOCUMENTS * response, response), shape


def _cut_layers(settings: Any, depth: int) -> None:
    text = settings.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]


def _sizes(values: Any) -> set[int]:
    """Returns all numbers of a config."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return set().union(*map(_sizes, values)) if values else set()
    return {values} if isinstance(values, int) and not isinstance(values, bool) else set()


def _prime_below(number: int, sizes: set[int]) -> int:
    """Returns the largest prime up to `number` that divides none of these sizes; `number` if there
    is none. So what has it as a factor has tokens."""
    for candidate in range(number, 2, -1):
        is_prime = all(candidate % d for d in range(2, int(candidate**0.5) + 1))
        if is_prime and not any(size and size % candidate == 0 for size in sizes):
            return candidate
    return number


def pair_of(length: int, response: int) -> MicroBatch:
    """Returns a pair of examples of `length` tokens, the last `response` of them trained."""
    ids = torch.zeros(DOCUMENTS, length, dtype=torch.int64)
    place = torch.arange(response) + length - response - 1
    first = torch.arange(response)
    zeros = torch.zeros(DOCUMENTS * response, dtype=torch.int64)
    return MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        rows=torch.cat([place + length * number for number in range(DOCUMENTS)]),
        labels=zeros,
        owner=zeros,
        pairs=torch.stack([first, first + response], dim=1),
        lam=torch.full((response,), 0.5),
        indices=tuple(range(DOCUMENTS)),
    )


if __name__ == "__main__":
    main()
