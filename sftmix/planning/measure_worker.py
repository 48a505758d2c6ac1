"""A rank that takes real steps: what each does, as in a trace, and how long it takes.

    python -m sftmix.planning.measure_worker REQUEST RESULT     on every rank

REQUEST: a JSON list of configs with their micro-batch, and further numbers of micro-batches to
time; RESULT: written by rank 0.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sftmix.config.schema import Config
from sftmix.engine.engine import Engine
from sftmix.engine.fake_world import laid_out, trace
from sftmix.engine.loading import hf_config
from sftmix.engine.process_group import init_ranks
from sftmix.engine.ranks import Ranks
from sftmix.loss.objective import Objective
from sftmix.planning.trace_worker import as_json, equal_pair

ROUNDS = 2  # over all requests, so that drift of the machine falls on all of them
WARM, TIMED = 2, 3  # steps of a round
PRODUCTS = 20  # of one timing


def main() -> None:
    requests = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ranks = init_ranks()
    found = [_counted(request, ranks) for request in requests]
    for _ in range(ROUNDS):
        for request, step in zip(requests, found, strict=True):
            _time(request, step, ranks)
    if ranks.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def _counted(request: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Returns what the steps of a request do."""
    config = Config.model_validate(request["config"])
    batch, counts, shape = equal_pair(request["max_tokens"], hf_config(config.model))
    done = trace(config, ranks, batch, counts)
    numbers = ("one", "two", *map(str, request.get("micro_batches", ())))
    return {
        **as_json(done, shape, ranks.world_size),
        "seconds": {number: [] for number in numbers},
        "product_flops": [],
        "threads": torch.get_num_threads(),
    }


def _time(request: dict[str, Any], step: dict[str, Any], ranks: Ranks) -> None:
    """Adds the seconds of a round to a step."""
    config = Config.model_validate(request["config"])
    batch, counts, _ = equal_pair(request["max_tokens"], hf_config(config.model))
    for name, seconds in step["seconds"].items():
        number = {"one": 1, "two": 2}.get(name) or int(name)
        seconds.extend(_seconds(config, ranks, batch, counts, number))
    step["product_flops"] += _product_flops(ranks)


def _seconds(config: Config, ranks: Ranks, batch: Any, counts: Any, number: int) -> list[float]:
    """Returns the seconds of each timed step of `number` micro-batches."""
    objective = Objective(mixup_weight=config.mixup.weight, next_token=config.objective)
    engine = Engine(config, config.model, ranks, None, train=config.train)
    batch = laid_out(batch, packs=engine.packs)
    found = []
    for step in range(WARM + TIMED):
        ranks.barrier()
        start = time.perf_counter()
        for each in range(number):
            engine.forward_backward(batch, counts, objective, is_last=each == number - 1)
        engine.step(learning_rate=config.train.learning_rate)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        if step >= WARM:
            found.append(time.perf_counter() - start)
    engine.close()
    return found


def _product_flops(ranks: Ranks) -> list[float]:
    """Returns the FLOP/s of some float32 products, while all ranks compute them."""
    rates = []
    for m, k, n in ((1024, 256, 768), (1024, 768, 256), (1024, 256, 2000), (512, 384, 384)):
        left, right = torch.randn(m, k), torch.randn(k, n)
        taken = []
        for _ in range(TIMED):
            ranks.barrier()
            start = time.perf_counter()
            for _ in range(PRODUCTS):
                left @ right
            taken.append((time.perf_counter() - start) / PRODUCTS)
        rates.append(2 * m * k * n / statistics.median(taken))
    return rates


if __name__ == "__main__":
    main()
