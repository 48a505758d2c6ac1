"""Runs on every rank: trains adapters for three steps in several layouts and writes what it saw
(rank 0).

Arguments: a working folder with `tokenizer/`, the model folders `tied/`, `untied/` and
`zero3.json`; a file to write.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import deepspeed
import torch
from pairs import COUNTS, micro_batch
from safetensors.torch import load_file

from sftmix.config.schema import Config
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.lora import is_adapter
from sftmix.engine.process_group import init_ranks
from sftmix.loss.objective import Objective

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
ranks = init_ranks()
tokenizer = tokenizer_from(folder / "tokenizer")

# For each rank its micro-batches, each a list of pairs.
LAYOUTS = {
    1: {"1 x 4": [[[0], [1], [2], [3]]]},
    2: {
        "2 x 2": [[[0], [1]], [[2], [3]]],
        "one rank without a response token at times": [[[2], [0, 1]], [[3], []]],
    },
}
# stage, model, site, activation checkpointing
CASES = [
    *((stage, "untied", "head", False) for stage in (0, 1, 2, 3)),
    (3, "tied", "head", True),
    (0, "tied", "input_embeddings", False),
    (3, "tied", "input_embeddings", True),
]


def config_for(stage, model, is_checkpointing):
    engine = {
        "zero_stage": stage,
        "precision": "fp32",
        "activation_checkpointing": is_checkpointing,
    }
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"path": str(folder / model), "lora": {"rank": 4, "alpha": 8}},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"generator": {}},
            "train": {"learning_rate": 1e-2},
            "engine": {
                **engine,
                **({"deepspeed": str(folder / "zero3.json")} if stage == 3 else {}),
            },
        }
    )


def train_steps(engine, layout, objective):
    """Takes three steps; returns the NTP and Mixup loss and the gradient norm of each."""
    steps = []
    for step in (1, 2, 3):
        engine.start_step(seed=0, step=step)
        pieces = layout[ranks.rank]
        sums = torch.zeros(2, dtype=torch.float64)
        for number, piece in enumerate(pieces, start=1):
            batch = micro_batch(piece, mixes_inputs=objective.mixes_inputs)
            loss = engine.forward_backward(batch, COUNTS, objective, is_last=number == len(pieces))
            sums += torch.stack([loss.ntp, loss.mixup]).double()
        norm = float(engine.step(learning_rate=1e-2))
        steps.append([*ranks.sum(sums).tolist(), norm])
    return steps


def changed_weights(engine, model):
    """Returns the names of frozen weights that are not bit for bit those of the file."""
    file = load_file(folder / model / "model.safetensors")
    changed, seen = [], set()
    for name, parameter in engine.module.named_parameters():
        if not is_adapter(name):
            with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_stage == 3):
                plain = engine.module.plain_name(name)
                changed += [] if torch.equal(parameter.data, file[plain]) else [plain]
                seen.add(plain)
    assert seen == set(file), seen ^ set(file)
    return changed


results = {}
for stage, model, site, is_checkpointing in CASES:
    config = config_for(stage, model, is_checkpointing)
    for layout_name, layout in LAYOUTS[ranks.world_size].items():
        if "at times" in layout_name and (stage, model) not in ((0, "untied"), (3, "tied")):
            continue
        engine = Engine(config, config.model, ranks, tokenizer, train=config.train)
        found = {"steps": train_steps(engine, layout, Objective(0.4, site))}
        # ZeRO-3 leaves a weight that is not gathered empty
        found["gathered"] = [
            name for name, p in engine.module.named_parameters() if stage == 3 and p.numel()
        ]
        found |= {"changed": changed_weights(engine, model), "frozen": engine.frozen_checksum()}
        found |= {
            "num_trained": engine.num_trained_parameters,
            "num_parameters": engine.num_parameters,
        }
        found["groups"] = sorted(
            [group["weight_decay"], len(group["params"])] for group in engine.optimizer.param_groups
        )
        results[f"{stage} {model} {site} {layout_name}"] = found
        if (site == "head" or stage == 0) and layout_name in ("1 x 4", "2 x 2"):
            export = folder / f"{stage}-{model}-{ranks.world_size}"
            engine.export(export / "model", tokenizer)
            engine.export_adapter(export / "adapter", tokenizer)
            logits = engine.logits(micro_batch([0, 2]))
            if ranks.is_main:
                torch.save(logits, export / "logits.pt")
                (export / "state").mkdir()
            ranks.barrier()
            assert engine.save_state(export / "state").error is None
        engine.close()
if ranks.is_main:
    result_path.write_text(json.dumps(results))
