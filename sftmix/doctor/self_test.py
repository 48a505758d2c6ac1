"""What `sftmix doctor` runs on every rank: compare ZeRO-3's gradients with one process, and measure
collectives.

    python -m sftmix.doctor.self_test FOLDER gradients collectives

The small model and its loss are those of a run; one process computes them by plain autograd, from
the textbook formula. Rank 0 writes FOLDER/result.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from sftmix.batches.collate import MicroBatch, build_micro_batch
from sftmix.batches.cut import StepCounts
from sftmix.cluster.liveness import processes
from sftmix.config.schema import Config
from sftmix.engine.deepspeed_internals import import_deepspeed
from sftmix.engine.engine import Engine
from sftmix.engine.loading import hf_config, load_source
from sftmix.engine.process_group import init_ranks
from sftmix.engine.ranks import Ranks
from sftmix.loss.objective import Objective

RESULT = "result.json"
VOCABULARY, MIXUP_WEIGHT, LEARNING_RATE = 256, 0.2, 1e-2
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# With the default threshold the weights of such a small model would stay whole on every rank, and
# nothing would be gathered.
DEEPSPEED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
MICRO_BATCHES = 2  # of each rank in the step
# bytes of the whole tensor
SIZES = {"cpu": (2**20, 2**23, 2**25), "cuda": (2**20, 2**24, 2**27, 2**29)}
ROUNDS = 5
BUDGET_SECONDS = 8.0  # after which larger tensors are left out

Pair = tuple[list[tuple[Any, Any]], float]


def draw_pairs(count: int) -> list[Pair]:
    """Returns pairs of (ids, response mask) examples of different lengths, each with its lam; equal
    on every rank."""
    generator = np.random.default_rng(0)
    pairs: list[Pair] = []
    for _ in range(count):
        members = []
        for length in generator.integers(6, 40, 2):
            responses = int(generator.integers(1, length - 2))
            members.append(
                (
                    generator.integers(3, VOCABULARY, length).astype(np.int32),
                    np.arange(length) >= length - responses,
                )
            )
        pairs.append((members, float(generator.uniform(0.05, 0.95))))
    return pairs


def batch_of(pair: Pair) -> MicroBatch:
    members, lam = pair
    return build_micro_batch(members, [(0, 1, lam)], indices=(0, 1), pad_id=0)


def textbook_loss(model: Any, pairs: list[Pair], counts: StepCounts) -> Tensor:
    """Returns NTP + mu * Mixup of the whole step, by its definition."""
    ntp, mixup = torch.zeros(()), torch.zeros(())
    for members, lam in pairs:
        logits, labels = [], []
        for ids, mask in members:
            tokens = torch.from_numpy(ids.astype(np.int64))
            rows = torch.from_numpy(np.flatnonzero(mask[1:]))
            logits.append(model(input_ids=tokens[None]).logits[0, rows])
            labels.append(tokens[rows + 1])
            ntp = ntp - log_softmax(logits[-1], dim=-1).gather(1, labels[-1][:, None]).sum()
        shared = min(len(rows) for rows in labels)
        mixed = log_softmax(lam * logits[0][:shared] + (1 - lam) * logits[1][:shared], dim=-1)
        for share, target in ((lam, labels[0]), (1 - lam, labels[1])):
            mixup = mixup - share * mixed.gather(1, target[:shared, None]).sum()
    return ntp / counts.num_ntp_tokens + MIXUP_WEIGHT * mixup / counts.num_mixup_tokens


def compare_gradients(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Returns the largest differences to one process: of gradients, relative to the largest element
    of the tensor, and of weights after the step, absolute. Collective: all ranks must call it."""
    started = time.monotonic()
    json_path = folder / f"deepspeed.{ranks.rank}.json"
    json_path.write_text(json.dumps(DEEPSPEED))
    config = Config.model_validate(
        {
            "run": {"dir": str(folder)},
            "model": {"architecture": ARCHITECTURE},
            "tokenizer": {"train": {}},
            "data": {"generator": {}},
            # A larger eps: otherwise an update is the sign of the gradient, and a rounding error
            # near 0 would appear in full.
            "train": {"learning_rate": LEARNING_RATE, "adam_eps": 1e-3},
            "engine": {
                "zero_stage": 3,
                "precision": "fp32",
                "kernel_backend": "torch",
                "deepspeed": str(json_path),
            },
        }
    )
    engine = Engine(config, config.model, ranks, None, train=config.train)
    pairs = draw_pairs(ranks.world_size * MICRO_BATCHES)
    responses = [[int(mask.sum()) for _, mask in members] for members, _ in pairs]
    counts = StepCounts(sum(map(sum, responses)), sum(map(min, responses)))
    own = pairs[ranks.rank :: ranks.world_size]
    engine.start_step(seed=0, step=1)
    for number, pair in enumerate(own, start=1):
        engine.forward_backward(
            batch_of(pair), counts, Objective(MIXUP_WEIGHT), is_last=number == len(own)
        )
    gradients = {
        name: gradient.detach().float().cpu() for name, gradient in engine.named_gradients()
    }
    engine.step(learning_rate=LEARNING_RATE)
    weights = {
        name: tensor.detach().float().cpu().clone() for name, tensor in engine.named_tensors()
    }
    found = (
        compare_to_one_process(config, pairs, counts, gradients, weights) if ranks.is_main else {}
    )
    engine.close()
    return {**found, "seconds": time.monotonic() - started}


def compare_to_one_process(
    config: Config,
    pairs: list[Pair],
    counts: StepCounts,
    gradients: dict[str, Tensor],
    weights: dict[str, Tensor],
) -> dict[str, Any]:
    train = config.train
    model = load_source(
        config.model, hf_config(config.model), dtype=torch.float32, seed=config.run.seed
    )
    textbook_loss(model, pairs, counts).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert set(expected) == set(gradients), (
        f"the models differ in {sorted(set(expected) ^ set(gradients))[:4]}"
    )
    differences = {
        name: _largest(gradients[name] - expected[name]) / _largest(expected[name])
        for name in expected
    }
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": train.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=train.adam_betas, eps=train.adam_eps).step()
    moved = max(
        _largest(weights[name] - parameter.detach()) for name, parameter in model.named_parameters()
    )
    worst = max(
        differences,
        key=lambda name: (
            float("inf") if differences[name] != differences[name] else differences[name]
        ),
    )
    return {"gradient": differences[worst], "tensor": worst, "weight": moved}


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def time_collectives(ranks: Ranks) -> list[dict[str, Any]]:
    """Returns for each size the seconds of an all-gather and of a reduce-scatter, medians. All
    ranks call it."""
    started, found = time.monotonic(), []
    for size in SIZES[ranks.device.type]:
        part = size // 4 // ranks.world_size
        whole, share = (
            torch.ones(part * ranks.world_size, device=ranks.device),
            torch.ones(part, device=ranks.device),
        )
        gather = partial(ranks.all_gather_into, whole, share)
        reduce = partial(ranks.reduce_scatter_into, share, whole)
        found.append(
            {
                "bytes": 4 * whole.numel(),
                "all_gather": _median_seconds(ranks, gather),
                "reduce_scatter": _median_seconds(ranks, reduce),
            }
        )
        if ranks.same_as_main(time.monotonic() - started > BUDGET_SECONDS):
            break
    return found


def _median_seconds(ranks: Ranks, collective: Callable[[], Any]) -> float:
    seconds = []
    for number in range(ROUNDS + 2):
        ranks.barrier()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        collective()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:  # the first calls open connections
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def main(folder: Path, wanted: list[str]) -> None:
    processes.die_with_parent()
    import_deepspeed()
    ranks = init_ranks()
    result: dict[str, Any] = {"device": ranks.device.type, "num_ranks": ranks.world_size}
    if "gradients" in wanted:
        result["gradients"] = compare_gradients(ranks, folder)
    if "collectives" in wanted:
        result["collectives"] = time_collectives(ranks)
    if ranks.is_main:
        (folder / RESULT).write_text(json.dumps(result))
    ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
