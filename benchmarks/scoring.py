"""Scoring every example of a data set, beside the loop that one would write, and what `online`
scores cost a training step.

    python benchmarks/scoring.py [--data FILE.json] [--hidden-size 256 --layers 4 | --model PATH]
    [--rounds 5] [--out FILE.json] torchrun --nproc-per-node 2 benchmarks/scoring.py ...

The loop takes examples in file order, pads them per batch, calls `model(input_ids=..., labels=...)`
of transformers, and reads each example's loss from the full logits; of several processes each takes
every n-th batch. Ours scores the same examples with the same weights through `score_examples`. Both
orders rotate; every round the perplexities are compared. Peak memory is each one's own growth of
the resident set, or of the allocated GPU memory. Online: whole optimiser steps with and without the
collection of token losses, in rotating order, at a learning rate of 0.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import torch
from numpy.typing import NDArray
from step import Setup, Work, build_config, build_work

from sftmix.batches.collate import collate
from sftmix.batches.cut import count_step
from sftmix.confidence.online import OnlineScores
from sftmix.confidence.scoring import WorkPlan, score_examples
from sftmix.engine.engine import Engine
from sftmix.engine.loading import hf_config, load_source
from sftmix.engine.process_group import init_ranks
from sftmix.engine.ranks import Ranks
from sftmix.errors import counted
from sftmix.loss.objective import Objective
from sftmix.storage.files import write_json

OURS, LOOP = "ours", "loop over transformers"
TARGETS = {f"{LOOP} / {OURS}": (">=", 2.5), "step with online scores / step": ("<=", 1.01)}


def scoring_calls(
    work: Work, engine: Engine, model: Any, *, loop_batch: int, unit_examples: int
) -> dict[str, Any]:
    """Returns name -> function of a round's number that gives (N,) perplexities; the loop's only
    for this rank's examples."""
    examples, ranks = work.examples, engine.ranks
    counts = examples.num_response_tokens

    def ours(_: int) -> NDArray[np.float64]:
        plan = WorkPlan(
            examples.num_tokens, unit_examples, work.config.confidence.micro_batch_tokens
        )
        return np.exp(
            score_examples(
                engine, examples, plan, pad_id=work.tokenizer.pad_token_id, title=""
            ).nll_sum
            / counts
        )

    @torch.no_grad()
    def loop(_: int) -> NDArray[np.float64]:
        perplexities = np.full(len(examples), np.nan)
        for start in range(ranks.rank * loop_batch, len(examples), ranks.world_size * loop_batch):
            chosen = range(start, min(start + loop_batch, len(examples)))
            rows = [examples.tokens(i) for i in chosen]
            width = max(len(ids) for ids, _ in rows)
            input_ids = torch.full((len(rows), width), work.tokenizer.pad_token_id)
            labels, attention = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
            for n, (ids, mask) in enumerate(rows):
                input_ids[n, : len(ids)], attention[n, : len(ids)] = torch.from_numpy(ids), 1
                labels[n, : len(ids)] = torch.where(
                    torch.from_numpy(mask), torch.from_numpy(ids).long(), -100
                )
            on_device = {"input_ids": input_ids, "attention_mask": attention, "labels": labels}
            on_device = {name: tensor.to(ranks.device) for name, tensor in on_device.items()}
            logits = model(**on_device).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), on_device["labels"][:, 1:], reduction="none"
            )
            perplexities[chosen.start : chosen.stop] = np.exp(
                losses.sum(dim=1).double().cpu().numpy() / counts[chosen.start : chosen.stop]
            )
        ranks.barrier()
        return perplexities

    return {OURS: ours, LOOP: loop}


def step_calls(work: Work, engine: Engine) -> dict[str, Any]:
    """Returns name -> function that takes a round's optimiser step, with and without online
    scores."""
    scores = OnlineScores(engine.ranks, len(work.examples))

    def step(number: int, online: OnlineScores | None) -> None:
        pieces = work.cut(number)
        counts = count_step(work.plan, work.steps[number], work.examples.num_response_tokens)
        for place, piece in enumerate(pieces, start=1):
            batch = collate(work.examples, work.plan, piece, pad_id=work.tokenizer.pad_token_id)
            loss = engine.forward_backward(batch, counts, Objective(), is_last=place == len(pieces))
            if online is not None:
                online.add(batch, loss)
        engine.step(learning_rate=0.0)

    return {
        "step": lambda number: step(number, None),
        "step with online scores": lambda number: step(number, scores),
    }


def measure(
    calls: dict[str, Any], *, num_rounds: int, device: torch.device, check: bool
) -> dict[str, list[float]]:
    """Returns name -> seconds of each round, after one that is not timed. `check`: the results must
    agree."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number, measured in enumerate(
        side_by_side.rounds(calls, num_rounds=1 + num_rounds, device=device)
    ):
        if check:
            ours, theirs = (measured[name][1] for name in calls)
            known = ~np.isnan(theirs)
            np.testing.assert_allclose(
                ours[known], theirs[known], rtol=1e-4 if device.type == "cpu" else 0.05
            )
        if number:
            for name, (elapsed, _) in measured.items():
                seconds[name].append(elapsed)
    return seconds


def rows_of(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    """Returns percentiles of each, and the median of the ratios within a round."""
    rows: dict[str, Any] = {}
    for name, values in seconds.items():
        p20, p50, p80 = side_by_side.spread(values)
        rows[name] = {"seconds": p50, "seconds_20": p20, "seconds_80": p80}
        print(f"  {name:28s} {p50:8.3f} s [{p20:.3f}, {p80:.3f}]", flush=True)
    sign, target = TARGETS[f"{over} / {under}"]
    ratio = statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
    rows[f"{over} / {under}"] = {"ratio": ratio, "target": f"{sign} {target}"}
    print(f"  {over} / {under}: {ratio:.3f} (target {sign} {target})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="instruction data in any format of the recipe; default: generated",
    )
    parser.add_argument("--limit", type=int, default=800, help="examples that are used")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="Hugging Face folder; default: a Llama with random weights, of",
    )
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument(
        "--loop-batch-size", type=int, default=8, help="examples of one forward of the loop"
    )
    parser.add_argument("--unit-examples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ranks: Ranks = init_ranks()
    record = side_by_side.machine(ranks.device, "benchmarks/scoring.py")
    with tempfile.TemporaryDirectory() as name:
        config = build_config(Setup.of(options), Path(name))
        work = build_work(config, Path(name), num_rounds=1 + 4 * options.rounds)
        engine = Engine(config, config.model, ranks, work.tokenizer, is_sharded=False)
        model = load_source(
            config.model,
            hf_config(config.model, work.tokenizer),  # the engine's own attends within documents
            dtype=next(engine.module.parameters()).dtype,
            seed=config.run.seed,
        )
        model = model.to(ranks.device).eval()
        calls = scoring_calls(
            work,
            engine,
            model,
            loop_batch=options.loop_batch_size,
            unit_examples=options.unit_examples,
        )
        tokens = int(work.examples.num_tokens.sum())
        print(
            f"{len(work.examples):,} examples, {tokens:,} tokens, {engine.num_parameters:,}"
            " parameters, " + counted(ranks.world_size, "process", "processes"),
            flush=True,
        )
        report = rows_of(
            measure(calls, num_rounds=options.rounds, device=ranks.device, check=True), LOOP, OURS
        )
        for each, call in calls.items():
            report[each]["peak_bytes"] = side_by_side.peak_bytes_of(
                lambda call=call: call(0), ranks.device
            )
            print(
                f"  {each:28s} {report[each]['peak_bytes'] / 2**20:8.0f} MiB more at its peak",
                flush=True,
            )
        engine.close()
        engine = Engine(config, config.model, ranks, work.tokenizer, train=config.train)
        steps = measure(
            step_calls(work, engine),
            num_rounds=4 * options.rounds,
            device=ranks.device,
            check=False,
        )
        report |= rows_of(steps, "step with online scores", "step")
    if options.out is not None and ranks.is_main:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            options.out,
            record
            | {"num_examples": options.limit, "num_tokens": tokens, "processes": ranks.world_size}
            | report,
        )


if __name__ == "__main__":
    main()
