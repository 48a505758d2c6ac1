"""Trains every architecture of a file, shrunk, for two steps through the real engine, in one
process.

Arguments: a JSON file of name -> {architecture, lora, zero_stage}; a folder with `tokenizer/`; a
file to write; DeepSpeed JSONs, used in turn.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from pairs import COUNTS, micro_batch

from sftmix.config.schema import Config
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks
from sftmix.loss.objective import Objective

architectures, folder, result_path, *deepspeed_jsons = (Path(argument) for argument in sys.argv[1:])
ranks = init_ranks()
tokenizer = tokenizer_from(folder / "tokenizer")


def config_for(architecture, lora, zero_stage, deepspeed_json):
    deepspeed = {"deepspeed": str(deepspeed_json)} if zero_stage == 3 else {}
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"architecture": architecture, "lora": lora},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"generator": {}},
            # what moves, moves by its gradient
            "train": {"learning_rate": 1e-3, "weight_decay": 0},
            "engine": {
                "zero_stage": zero_stage,
                "precision": "fp32",
                "activation_checkpointing": True,
                **deepspeed,
            },
        }
    )


def train_two_steps(deepspeed_json, **described):
    config = config_for(**described, deepspeed_json=deepspeed_json)
    engine = Engine(config, config.model, ranks, tokenizer, train=config.train)
    before = {name: tensor.clone() for name, tensor in engine.named_tensors()}
    losses = []
    for step in (1, 2):
        engine.start_step(seed=0, step=step)
        for number, pairs in enumerate(([0, 1], [2, 3]), start=1):
            loss = engine.forward_backward(
                micro_batch(pairs), COUNTS, Objective(0.2), is_last=number == 2
            )
            losses.append([loss.ntp.item(), loss.mixup.item(), loss.auxiliary.item()])
        engine.step(learning_rate=1e-3)
    moved = {
        name: (tensor - before[name]).abs().max().item() for name, tensor in engine.named_tensors()
    }
    transform = engine.module.projection.transform
    found = {
        "class": type(engine.module.model).__name__,
        "is_tied": (
            engine.module.projection.weight is engine.module.model.get_input_embeddings().weight
        ),
        "softcap": transform.softcap,
        "scale": transform.scale,
        "losses": losses,
        "is_finite": (
            all(math.isfinite(value) for row in losses for value in row)
            and all(math.isfinite(value) for value in moved.values())
        ),
        "unmoved": sorted(
            name
            for name, change in moved.items()
            if change == 0 and torch.is_floating_point(before[name])
        ),
        "names": sorted(moved),
        "num_trained": engine.num_trained_parameters,
    }
    engine.close()
    return found


found = {
    name: train_two_steps(deepspeed_jsons[number % len(deepspeed_jsons)], **described)
    for number, (name, described) in enumerate(json.loads(architectures.read_text()).items())
}
result_path.write_text(json.dumps(found))
