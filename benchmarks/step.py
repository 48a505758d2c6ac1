"""The time of a whole optimiser step of SFTMix beside NTP alone, TRL's SFTTrainer, and textbook
SFTMix on it, in one run.

    python benchmarks/step.py [--data FILE.json] [--hidden-size 128 --layers 3 | --model PATH]
    [--rounds 20] [--out FILE.json]

Without --data the examples are generated, without --model the weights are random. A step is
everything from token ids on the host to updated weights: padding, forward, backward, clipping,
AdamW. Each round takes every provider through one step on the same examples, in rotating order;
ratios are medians of the ratios within a round. The learning rate is 0, which costs what any other
does: so the weights stay the same, and in every round, the untimed first ones included, the loss
and the gradient norm of a provider and its twin on TRL must agree, or the run ends. The two
objectives share one engine.

TRL's rows need `pip install trl`. They are made of the calls of the trainer's own loop,
`get_batch_samples`, `training_step`, `clip_grad_norm_` and `optimizer.step`, without its callbacks
and log, as ours are without the run's log: `trainer.train()` as a whole cannot take turns with
another trainer. What differs between the providers:

    engine       ours runs on DeepSpeed (--zero-stage), TRL on accelerate, in one process
    bf16         ours: bf16 weights, float32 ones in the optimiser; TRL: float32, autocast
    head         ours computes response positions only; TRL too on a GPU, all on a CPU;
                 it also takes each token's entropy and accuracy. The textbook has the logits of all
                 positions
    micro-batch  ours are packed: no padding; TRL's are cut by the same token budget from examples
                 sorted by length (less padding than its own); with --trl-micro-batch-size TRL has
                 that many examples in each, in the order of the plan, as its sampler would cut them
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import side_by_side
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftmix.batches.collate import collate
from sftmix.batches.cut import count_step, cut_step
from sftmix.batches.examples import TokenisedExamples
from sftmix.config.schema import Config, ObjectiveConfig
from sftmix.data.prepare import prepare
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.loading import hf_config, load_source
from sftmix.engine.precision import resolve_precision
from sftmix.engine.process_group import init_ranks
from sftmix.engine.ranks import has_gpu
from sftmix.loss.objective import Objective
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, Matching, StepUnits
from sftmix.pairing.split import split_values
from sftmix.pipeline import preflight
from sftmix.storage.files import write_json
from sftmix.train.example_weights import weigh_examples

PROVIDERS = MIXUP, NTP, IR_DRO, TRL_NTP, TRL_MIXUP = (
    "sftmix (ours)",
    "ntp (ours)",
    "ir-dro (ours)",
    "ntp (trl)",
    "sftmix (textbook on trl)",
)
TWINS = ((TRL_NTP, NTP), (TRL_MIXUP, MIXUP))
RATIOS = (
    (MIXUP, NTP),
    (IR_DRO, NTP),
    (NTP, TRL_NTP),
    (MIXUP, TRL_MIXUP),
    (TRL_MIXUP, TRL_NTP),
)
TARGET = {"cuda": 1.02, "cpu": 1.05}  # of the first ratio
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}  # relative, between twins
NUM_WARMUP_ROUNDS = 2
PLAIN_LINEAR = torch.nn.functional.linear


@dataclass(frozen=True)
class StepResult:
    """loss: what was differentiated, in nats. grad_norm: before clipping. num_padded_tokens: of all
    micro-batches."""

    loss: Tensor
    grad_norm: Tensor | float
    num_padded_tokens: int
    num_micro_batches: int


@dataclass(frozen=True)
class Work:
    """What all providers are given. steps: for each round, the units of the plan that its step
    trains on; all are pairs."""

    config: Config
    tokenizer: Any
    examples: TokenisedExamples
    plan: StepUnits
    steps: list[NDArray[np.int64]]

    def cut(self, number: int, *, packs: bool = False) -> list[NDArray[np.int64]]:
        """Returns the units of each micro-batch of a round's step, packed or padded."""
        budget = self.config.train.micro_batch_tokens
        return cut_step(
            self.plan,
            self.steps[number],
            self.examples.num_tokens,
            micro_batch_tokens=budget,
            num_ranks=1,
            packs=packs,
        )[0]

    def sizes(self) -> NDArray[np.int64]:
        """Returns a row for each timed round: its step's real tokens, response tokens and mixed
        positions."""
        rows = []
        for units in self.steps[NUM_WARMUP_ROUNDS:]:
            counts = count_step(self.plan, units, self.examples.num_response_tokens)
            rows.append(
                (
                    self.examples.num_tokens[self.plan.units[units]].sum(),
                    counts.num_ntp_tokens,
                    counts.num_mixup_tokens,
                )
            )
        return np.array(rows)


Step = Callable[[int], StepResult]


@dataclass(frozen=True)
class Setup:
    """The model, the data and the sizes of a benchmark. data: a file; None is generated. model: a
    folder; None is a Llama of these sizes with random weights. zero_stage: None is 0 in fp32, 1 in
    other precisions. Sizes are in tokens, examples and elements."""

    hidden_size: int = 256
    layers: int = 4
    vocab_size: int = 4000
    data: str | None = None
    limit: int = 800
    max_length: int = 512
    model: str | None = None
    precision: str = "auto"
    zero_stage: int | None = None
    batch_size: int = 32
    micro_batch_tokens: int = 8192
    backend: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace, **fixed: Any) -> Setup:
        """Returns the setup of a benchmark's options; `fixed` is for what it has no option for."""
        names = {field.name for field in fields(cls)} & vars(options).keys()
        return cls(**{name: getattr(options, name) for name in names} | fixed)


def build_config(setup: Setup, folder: Path) -> Config:
    """Returns a config of the recipe with the model, the data and the sizes asked for. Raises
    ConfigError."""
    precision = resolve_precision(setup.precision)
    stage = setup.zero_stage if setup.zero_stage is not None else 0 if precision == "fp32" else 1
    architecture = {
        "model_type": "llama",
        "vocab_size": setup.vocab_size,
        "hidden_size": setup.hidden_size,
        "intermediate_size": 3 * setup.hidden_size,
        "num_hidden_layers": setup.layers,
        "num_attention_heads": max(1, setup.hidden_size // 32),
        "max_position_embeddings": setup.max_length,
        "tie_word_embeddings": True,
    }
    # small data does not hold more; the head may be wider
    num_pieces = min(setup.vocab_size, 4000 if setup.data else 500)
    source = {"path": setup.data, "limit": setup.limit, "held_out_share": 0}
    generated = {"generator": {"num_train": setup.limit, "num_held_out": 2}}
    values: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "model": {"path": setup.model} if setup.model else {"architecture": architecture},
        "tokenizer": {} if setup.model else {"train": {"vocab_size": num_pieces}},
        "data": {"max_length": setup.max_length, **(source if setup.data else generated)},
        "train": {
            "batch_size": setup.batch_size,
            "micro_batch_tokens": setup.micro_batch_tokens,
        },
        "engine": (
            {"zero_stage": stage, "precision": precision}
            | ({"kernel_backend": setup.backend} if setup.backend else {})
        ),
    }
    config = Config.model_validate(values)
    preflight.check(config)
    return config


def build_work(config: Config, folder: Path, *, num_rounds: int) -> Work:
    """Tokenises the data, as the recipe does, and pairs it at random: a confidence would take a
    reference run."""
    prepare(config, folder)
    examples = TokenisedExamples(folder / "train.arrow")
    parts = np.array(
        split_values(examples.example_ids, np.random.default_rng(0).random(len(examples)))
    )
    confident, unconfident, middle = (
        np.flatnonzero(parts == part) for part in (CONFIDENT, UNCONFIDENT, MIDDLE)
    )
    matching = Matching(
        confident, unconfident, middle, seed=config.run.seed, alpha=config.mixup.alpha
    )
    plan = matching.units(0, 0, matching.num_units)
    pairs = np.flatnonzero(plan.units[:, 1] >= 0)
    size = config.train.batch_size // 2
    num_steps = len(pairs) // size
    assert num_steps > 0, (
        f"{len(examples)} examples do not fill a step of {config.train.batch_size}"
    )
    steps = [pairs[size * (n % num_steps) :][:size] for n in range(num_rounds)]
    return Work(config, tokenizer_from(folder / "tokenizer"), examples, plan, steps)


def our_steps(work: Work) -> dict[str, Step]:
    """Returns the steps of our objectives on one engine: the body of sftmix/train/loop.py without
    its log."""
    config = work.config
    engine = Engine(config, config.model, init_ranks(), work.tokenizer, train=config.train)
    # ZeRO-3 has put its own there for all models of the process
    linear = torch.nn.functional.linear

    def step(number: int, objective: Objective) -> StepResult:
        counts = count_step(work.plan, work.steps[number], work.examples.num_response_tokens)
        pieces = work.cut(number, packs=engine.packs)
        engine.start_step(seed=0, step=number)
        loss, num_padded = torch.zeros((), device=engine.ranks.device), 0
        with patch.object(torch.nn.functional, "linear", linear):
            batches = [
                collate(
                    work.examples,
                    work.plan,
                    piece,
                    pad_id=work.tokenizer.pad_token_id,
                    packs=engine.packs,
                )
                for piece in pieces
            ]
            weighed = weigh_examples(engine, batches, counts, objective.next_token)
            for place, batch in enumerate(weighed, start=1):
                part = engine.forward_backward(
                    batch, counts, objective, is_last=place == len(batches)
                )
                loss += part.ntp + objective.mixup_weight * part.mixup + part.auxiliary
                num_padded += batch.input_ids.numel()
            grad_norm = engine.step(learning_rate=0.0)
        return StepResult(loss, grad_norm, num_padded, len(pieces))

    print(
        f"{engine.num_parameters:,} parameters, {engine.ranks.device}, {engine.precision}, ZeRO"
        f" stage {engine.zero_stage}",
        flush=True,
    )
    return {
        MIXUP: lambda number: step(number, Objective(config.mixup.weight)),
        NTP: lambda number: step(number, Objective()),
        IR_DRO: lambda number: step(
            number, Objective(next_token=ObjectiveConfig(weighting="ir_dro"))
        ),
    }


def trl_steps(work: Work, *, micro_batch_size: int | None, folder: Path) -> dict[str, Step]:
    """Returns the steps of TRL's trainer and of textbook SFTMix on it; they must be made before
    ours join a process group."""
    import datasets
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    config, train = work.config, work.config.train

    class PairCollator(DataCollatorForLanguageModeling):
        """Adds the flat positions (among all that predict a token) of both partners, and lam, of
        every mixed position."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = super().torch_call(examples)
            labels = batch["labels"][:, 1:]
            rows = [
                n * labels.shape[1] + row.ne(-100).nonzero().flatten()
                for n, row in enumerate(labels)
            ]
            sizes = [min(len(a), len(b)) for a, b in zip(rows[::2], rows[1::2], strict=True)]
            batch["confident"] = torch.cat(
                [row[:size] for row, size in zip(rows[::2], sizes, strict=True)]
            )
            batch["unconfident"] = torch.cat(
                [row[:size] for row, size in zip(rows[1::2], sizes, strict=True)]
            )
            batch["lam"] = torch.tensor(
                [example["lam"] for example in examples[::2]]
            ).repeat_interleave(torch.tensor(sizes))
            return batch

    class TextbookSFTMix(SFTTrainer):
        """SFTMix as the paper writes it: mixed hidden states go through the head again."""

        def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
            batches, num_items = super().get_batch_samples(*arguments)
            self.num_mixup_tokens = sum(len(batch["lam"]) for batch in batches)
            return batches, num_items

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels, lam, confident, unconfident = (
                inputs.pop(name) for name in ("labels", "lam", "confident", "unconfident")
            )
            labels = labels[:, 1:].flatten()
            outputs = model(**inputs, output_hidden_states=True, use_cache=False)
            cross_entropy = torch.nn.functional.cross_entropy
            ntp = (
                cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels, reduction="sum")
                / num_items_in_batch
            )
            hidden = outputs.hidden_states[-1][:, :-1].flatten(0, 1)
            mixed = lam[:, None] * hidden[confident] + (1 - lam[:, None]) * hidden[unconfident]
            with self.accelerator.autocast():
                logits = self.model.get_output_embeddings()(mixed.to(hidden.dtype)).float()
            to_confident = cross_entropy(logits, labels[confident], reduction="none")
            to_unconfident = cross_entropy(logits, labels[unconfident], reduction="none")
            mixup = (lam * to_confident + (1 - lam) * to_unconfident).sum() / self.num_mixup_tokens
            return ntp + config.mixup.weight * mixup

    encoded = [work.examples.tokens(index) for index in range(len(work.examples))]
    rows = {
        "input_ids": [ids for ids, _ in encoded],
        "labels": [np.where(mask, ids, -100) for ids, mask in encoded],
    }
    lam = np.ones(len(work.examples))
    lam[work.plan.units[:, 0]] = work.plan.lam
    dataset = datasets.Dataset.from_dict(rows)
    if micro_batch_size is None:
        cuts = [work.cut(number) for number in range(len(work.steps))]
    else:
        cuts = [
            np.split(units, range(micro_batch_size // 2, len(units), micro_batch_size // 2))
            for units in work.steps
        ]
    batches = [work.plan.units[piece].flatten().tolist() for pieces in cuts for piece in pieces]
    arguments = SFTConfig(
        output_dir=str(folder),
        gradient_checkpointing=False,
        bf16=config.engine.precision == "bf16",
        use_cpu=not has_gpu(),
        optim="adamw_torch_fused" if has_gpu() else "adamw_torch",  # as in our engine
        learning_rate=0.0,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        adam_epsilon=train.adam_eps,
        max_grad_norm=train.max_grad_norm,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to="none",
    )

    def step_of(trainer_class: type[SFTTrainer], data: datasets.Dataset, collator: Any) -> Step:
        model = load_source(
            config.model,
            hf_config(config.model, work.tokenizer),
            dtype=torch.float32,
            seed=config.run.seed,
        )
        trainer = trainer_class(
            model,
            arguments,
            data_collator=collator,
            train_dataset=data,
            processing_class=work.tokenizer,
        )
        model, trainer.optimizer = trainer.accelerator.prepare(
            trainer.model, trainer.create_optimizer()
        )
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=batches, collate_fn=trainer.data_collator, pin_memory=has_gpu()
        )
        collated = iter(loader)

        def step(number: int) -> StepResult:
            inputs, num_items = trainer.get_batch_samples(
                collated, len(cuts[number]), arguments.device
            )
            trainer.current_gradient_accumulation_steps = len(inputs)
            num_padded = sum(batch["input_ids"].numel() for batch in inputs)
            with patch.object(torch.nn.functional, "linear", PLAIN_LINEAR):
                losses = [trainer.training_step(model, batch, num_items) for batch in inputs]
                grad_norm = trainer.accelerator.clip_grad_norm_(
                    model.parameters(), arguments.max_grad_norm
                )
                trainer.optimizer.step()
                model.zero_grad()
            return StepResult(torch.stack(losses).sum(), grad_norm, num_padded, len(inputs))

        return step

    return {
        TRL_NTP: step_of(SFTTrainer, dataset, None),
        TRL_MIXUP: step_of(
            TextbookSFTMix,
            dataset.add_column("lam", lam),
            PairCollator(work.tokenizer.pad_token_id),
        ),
    }


def check_twins(results: dict[str, StepResult], precision: str) -> None:
    """Raises where a provider and its twin on TRL have computed different things."""
    for twin, name in TWINS:
        if twin in results:
            for quantity in ("loss", "grad_norm"):
                ours, theirs = (float(getattr(results[n], quantity)) for n in (name, twin))
                message = (
                    f"{quantity}: {name} {ours:.6g}, {twin} {theirs:.6g}: the two do not compute"
                    " the same"
                )
                assert abs(ours - theirs) <= TOLERANCE[precision] * abs(theirs), message


def measure(
    steps: dict[str, Step], work: Work, *, device: torch.device
) -> dict[str, dict[str, dict[str, float] | str]]:
    """Returns a row per provider and per ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, list[StepResult]] = {name: [] for name in steps}
    for number, measured in enumerate(
        side_by_side.rounds(steps, num_rounds=len(work.steps), device=device)
    ):
        check_twins(
            {name: result for name, (_, result) in measured.items()}, work.config.engine.precision
        )
        if number >= NUM_WARMUP_ROUNDS:
            for name, (elapsed, result) in measured.items():
                seconds[name].append(elapsed)
                results[name].append(result)
    tokens, responses, _ = work.sizes().T
    rows: dict[str, dict[str, float] | str] = {}
    for name in PROVIDERS:
        if name not in steps:
            rows[name] = "not measured: trl is not installed"
            continue
        p20, p50, p80 = side_by_side.spread(seconds[name])
        rows[name] = {
            "ms": 1e3 * p50,
            "ms_20": 1e3 * p20,
            "ms_80": 1e3 * p80,
            "tokens_per_second": float(np.median(tokens / seconds[name])),
            "response_tokens_per_second": float(np.median(responses / seconds[name])),
            "padding_share": (
                1 - float(tokens.sum()) / sum(result.num_padded_tokens for result in results[name])
            ),
            "micro_batches_per_step": float(
                np.mean([result.num_micro_batches for result in results[name]])
            ),
            "loss_nats_last_round": float(results[name][-1].loss),
            "grad_norm_last_round": float(results[name][-1].grad_norm),
        }
    ratios: dict[str, dict[str, float] | str] = {}
    for over, under in RATIOS:
        if over in steps and under in steps:
            p20, p50, p80 = side_by_side.spread(
                a / b for a, b in zip(seconds[over], seconds[under], strict=True)
            )
            ratios[f"{over} / {under}"] = {"ratio": p50, "ratio_20": p20, "ratio_80": p80}
        else:
            ratios[f"{over} / {under}"] = "not measured: trl is not installed"
    return {"providers": rows, "ratios": ratios}


def show(report: dict[str, dict[str, dict[str, float] | str]], device: torch.device) -> None:
    """Prints the rows as two tables."""
    print(
        f"  {'':24s}  {'ms a step [20%, 80%]':>26s}  {'tokens/s':>9s}  {'response tokens/s':>17s} "
        f" {'padding':>7s}  micro-batches"
    )
    for name, row in report["providers"].items():
        if isinstance(row, str):
            print(f"  {name:24s}  {row}")
            continue
        time = f"{row['ms']:.1f} [{row['ms_20']:.1f}, {row['ms_80']:.1f}]"
        rates = f"{row['tokens_per_second']:9,.0f}  {row['response_tokens_per_second']:17,.0f}"
        print(
            f"  {name:24s}  {time:>26s}  {rates}  {row['padding_share']:7.1%} "
            f" {row['micro_batches_per_step']:13.1f}"
        )
    target = f"   target on a {'GPU' if device.type == 'cuda' else 'CPU'}: <= {TARGET[device.type]}"
    for name, row in report["ratios"].items():
        text = (
            row
            if isinstance(row, str)
            else f"{row['ratio']:.3f} [{row['ratio_20']:.3f}, {row['ratio_80']:.3f}]"
        )
        print(f"  {name:46s}  {text}{target if name == f'{MIXUP} / {NTP}' else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default=None,
        metavar="FILE",
        help="instruction data in any format of the recipe; default: generated",
    )
    parser.add_argument("--limit", type=int, default=800, help="examples that are used")
    parser.add_argument("--max-length", type=int, default=512, help="tokens per example")
    parser.add_argument(
        "--model",
        default=None,
        metavar="PATH",
        help="Hugging Face folder; default: a Llama with random weights, of",
    )
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument(
        "--batch-size", type=int, default=32, help="examples per step, an even number"
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=8192,
        help="token budget of one forward, padding included",
    )
    parser.add_argument(
        "--trl-micro-batch-size",
        type=int,
        default=None,
        help="examples of one forward in TRL; default: our micro-batches",
    )
    parser.add_argument(
        "--zero-stage",
        type=int,
        default=None,
        choices=[0, 1, 2, 3],
        help="ours; default: 0 in fp32, else 1",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "bf16", "fp32"],
        help="default: bf16 on GPUs that have it",
    )
    parser.add_argument(
        "--backend",
        default=None,
        choices=["torch", "triton"],
        help="of our loss; default: the recipe's",
    )
    parser.add_argument(
        "--device",
        default=None,
        choices=["cuda"],
        help='insist on a GPU: without one every row is "not measured"',
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help=f"at least 2, after {NUM_WARMUP_ROUNDS} that are not timed",
    )
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.batch_size % 2 or (options.trl_micro_batch_size or 2) % 2:
        parser.error("pairs are never cut: both batch sizes must be even")
    if options.device == "cuda" and not has_gpu():
        print("no GPU here: every row is not measured")
        rows = dict.fromkeys(PROVIDERS, "not measured: no GPU")
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.out, {"device": "not measured: no GPU", "providers": rows})
        return
    device = torch.device("cuda" if has_gpu() else "cpu")
    record = side_by_side.machine(device, "benchmarks/step.py", packages=("trl", "accelerate"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = build_config(Setup.of(options), folder)
        work = build_work(config, folder, num_rounds=NUM_WARMUP_ROUNDS + options.rounds)
        is_there = importlib.util.find_spec("trl") is not None
        steps = (
            trl_steps(work, micro_batch_size=options.trl_micro_batch_size, folder=folder)
            if is_there
            else {}
        )
        steps = our_steps(work) | steps
        report = measure(steps, work, device=device)
    names = ("tokens_per_step", "response_tokens_per_step", "mixed_positions_per_step")
    sizes = dict(zip(names, work.sizes().mean(axis=0).tolist(), strict=True))
    print(
        f"{options.batch_size} examples a step; on average",
        ", ".join(f"{value:,.0f} {name}" for name, value in sizes.items()),
    )
    show(report, device)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        settings = config.engine.model_dump(
            include={"precision", "zero_stage", "kernel_backend"}
        ) | {"rounds": options.rounds}
        write_json(options.out, record | settings | sizes | report)


if __name__ == "__main__":
    main()
