"""Tokens per second of whole training runs: packed beside padded, SFTMix beside NTP, ours beside
TRL's `SFTTrainer.train()`, in turns.

    python benchmarks/train.py --data FILE.json [--hidden-size 256 --layers 7 | --model PATH]
    [--ranks 2] [--zero-stage 0] [--arms packed padded sftmix trl] [--rounds 3] [--out FILE.json]

Ours are the real commands, `sftmix baseline` and `sftmix train`, in processes of their own: data
read from disk, batches, DeepSpeed, log. The rate is that of the run's own meter: real tokens (no
padding) over the seconds of training, without start, checkpoints and exports. TRL's (`pip install
trl`) is a process that calls `SFTTrainer.train()` on the same token ids, masks and model; its
seconds are the trainer's `train_runtime`, whose log and saving are switched off. Each round runs
every arm once, in rotating order; ratios are those within a round.

    packed          NTP, examples one after another (engine.packing=auto, the default)
    padded          NTP, examples padded to equal length (engine.packing=off)
    sftmix          NTP + 0.2 Mixup, packed
    trl             NTP, TRL's trainer with examples of like length in a micro-batch
                    (train_sampling_strategy=group_by_length), its own chunked loss, one process
    small-batches   packed, micro-batches of 512 tokens
    checkpointing   packed, with activation checkpointing
    zero1, zero2, zero3   packed, on that ZeRO stage
    lora            packed, adapters on all linear layers (`pip install peft`)
    offload         packed, ZeRO 3 with the optimiser on the host, activation checkpointing

The arms behind `trl` are for memory: `peak GiB` is the most that a rank's process held (on a GPU:
that torch's allocator held).

With `--device cuda` on a machine without a GPU, the record says that nothing was measured.

All see the same examples, number of epochs, batch size and learning rate. The score table is
random: it decides which examples are paired, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import side_by_side
import torch

from sftmix.batches.examples import TokenisedExamples
from sftmix.engine.ranks import has_gpu
from sftmix.train.log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
# arm -> the overrides that make it
ARMS: dict[str, list[str]] = {
    "packed": [],
    "padded": ["engine.packing=off"],
    "sftmix": [],
    "small-batches": ["train.micro_batch_tokens=512"],
    "checkpointing": ["engine.activation_checkpointing=true"],
    **{f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in (1, 2, 3)},
    "lora": ["model.lora={}"],
    "offload": [
        "engine.zero_stage=3",
        "engine.deepspeed=configs/deepspeed/zero3_offload.json",
        "engine.activation_checkpointing=true",
    ],
}
RATIOS = (("packed", "padded"), ("packed", "trl"), ("packed", "sftmix"))


def sftmix(stage: str, *arguments: str) -> str:
    """Runs a stage in a process of its own; returns what it prints. A failure ends the benchmark
    with its output."""
    command = [sys.executable, "-m", "sftmix.cli", stage, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def architecture(hidden_size: int, layers: int) -> str:
    """Returns a Llama's sizes as a value of `model.architecture`."""
    sizes = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 11 // 4 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden_size // 64),
    }
    return "{" + ", ".join(f"{name}: {value}" for name, value in sizes.items()) + "}"


def new_config(options: argparse.Namespace, folder: Path) -> str:
    """Writes the first `options.examples` rows to `folder / "data.json"`, and a config whose run
    folder is `folder / "run"`; returns its path."""
    rows = json.loads(Path(options.data).read_text())[: options.examples]
    (folder / "data.json").write_text(json.dumps(rows))
    config = folder / "config.yaml"
    config.write_text(f"run:\n  dir: {folder / 'run'}\n")
    return str(config)


def prepared(options: argparse.Namespace, folder: Path) -> list[str]:
    """Prepares data and split in `folder / "run"`; returns the overrides of all arms."""
    config = new_config(options, folder)
    random = [
        f"model.architecture={architecture(options.hidden_size, options.layers)}",
        f"tokenizer.train={{vocab_size: {options.vocab_size}}}",
    ]
    model = [f"model.path={options.model}"] if options.model else random
    overrides = [
        *model,
        f"data.path={folder / 'data.json'}",
        "data.held_out_share=0",
        f"data.max_length={options.max_length}",
        f"train.batch_size={options.batch_size}",
        f"train.epochs={options.epochs}",
        f"train.micro_batch_tokens={options.micro_batch_tokens}",
        "train.learning_rate=1e-5",
        "log.every_steps=1000000",
        f"engine.zero_stage={options.zero_stage}",
        f"engine.precision={options.precision}",
        f"engine.num_processes={options.ranks}",
        "confidence.scores_column=quality",
        f"confidence.scores={folder / 'scores.parquet'}",
    ]
    run = folder / "run"
    sftmix("data", config, *[o for o in overrides if not o.startswith("confidence.")])
    ids = TokenisedExamples(run / "data" / "train.arrow").example_ids.to_pylist()
    quality = np.random.default_rng(0).random(len(ids))
    pq.write_table(pa.table({"example_id": ids, "quality": quality}), folder / "scores.parquet")
    sftmix("split", config, *overrides)
    return [config, *overrides]


def run_ours(arm: str, common: list[str], folder: Path) -> dict[str, float]:
    """Trains once; returns real, padded tokens/s, seconds of training, GiB at the peak, and MFU on
    a device whose peak is known."""
    run = folder / "run"
    stage, output = ("train", run / "sftmix") if arm == "sftmix" else ("baseline", run / "baseline")
    sftmix(stage, *common, *ARMS[arm], "--force")
    facts = json.loads((output / "manifest.json").read_text())["facts"]
    last = read_metrics(output / "metrics.jsonl")[-1]
    shutil.rmtree(output)
    return {
        "real tokens/s": facts["real_tokens_per_second"],
        "padded tokens/s": facts["padded_tokens_per_second"],
        "seconds": facts["training_seconds"],
        "peak GiB": last["memory/peak (GiB)"],
        **({"MFU": facts["mfu"]} if "mfu" in facts else {}),
    }


def run_trl(folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--trl-worker", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((folder / "trl.json").read_text()))


def trl_worker(options: argparse.Namespace, folder: Path) -> None:
    """Trains with TRL's trainer on the prepared data; writes trl.json."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    from sftmix.config.reader import load_config
    from sftmix.data.tokenizer import tokenizer_from
    from sftmix.engine.loading import hf_config, load_source

    run = folder / "run"
    config = load_config(run)
    tokenizer = tokenizer_from(run / "data" / "tokenizer")
    examples = TokenisedExamples(run / "data" / "train.arrow")
    encoded = [examples.tokens(index) for index in range(len(examples))]
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in encoded],
            "labels": [np.where(mask, ids, -100) for ids, mask in encoded],
            "length": [len(ids) for ids, _ in encoded],
        }
    )
    train = config.train
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=options.trl_micro_batch,
        gradient_accumulation_steps=max(1, train.batch_size // options.trl_micro_batch),
        train_sampling_strategy="group_by_length",
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=False,
        bf16=config.engine.precision == "bf16",
        use_cpu=not has_gpu(),
        optim="adamw_torch_fused",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.run.seed,
    )
    model = load_source(
        config.model,
        hf_config(config.model, tokenizer),
        dtype=torch.float32,
        seed=config.run.seed,
    )
    trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    seconds = trainer.train().metrics["train_runtime"]
    tokens = float(examples.num_tokens.sum()) * train.epochs
    (folder / "trl.json").write_text(
        json.dumps({"real tokens/s": tokens / seconds, "seconds": seconds})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a JSON list of Alpaca rows")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument(
        "--model", help="a model folder; default: a random Llama of the sizes below"
    )
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cuda"), default="auto")
    parser.add_argument("--trl-micro-batch", type=int, default=8, help="examples of one of TRL's")
    parser.add_argument("--arms", nargs="+", default=["packed", "padded", "sftmix"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trl-worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl_worker is not None:
        trl_worker(options, options.trl_worker)
        return
    device = torch.device("cuda" if has_gpu() else "cpu")
    record: dict[str, Any] = {
        **side_by_side.machine(device, "benchmarks/train.py", packages=["trl"]),
        "rounds": [],
    }
    if options.device == "cuda" and not has_gpu():
        print("not measured: this machine has no GPU")
        record = {"device": "cuda", "command": record["command"], "rounds": "not measured: no GPU"}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = prepared(options, folder)
        lengths = TokenisedExamples(folder / "run" / "data" / "train.arrow").num_tokens
        record["examples"], record["tokens"] = len(lengths), int(lengths.sum())
        for number in range(options.rounds):
            arms = options.arms[number % len(options.arms) :]
            arms += options.arms[: number % len(options.arms)]
            found = {
                arm: run_trl(folder) if arm == "trl" else run_ours(arm, common, folder)
                for arm in arms
            }
            record["rounds"].append(found)
            for arm in options.arms:
                rates = ", ".join(f"{k} {v:,.2f}" for k, v in found[arm].items())
                print(f"round {number + 1}: {arm:8} {rates}", flush=True)
    record["ratios"] = {}
    for ours, other in RATIOS:
        if {ours, other} <= set(options.arms):
            ratios = [
                r[ours]["real tokens/s"] / r[other]["real tokens/s"] for r in record["rounds"]
            ]
            record["ratios"][f"{ours} / {other}"] = ratios
            print(
                f"{ours} / {other}: median {np.median(ratios):.3f}, {min(ratios):.3f} to"
                f" {max(ratios):.3f}, {len(ratios)} rounds"
            )
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
