"""Runs on every rank: trains two steps of a tiny model in several layouts and writes what it saw
(rank 0).

Arguments: a working folder with `tokenizer/` and the model folders `tied/`, `untied/`; a file to
write.
"""

import atexit
import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from pairs import COUNTS, micro_batch
from safetensors.torch import load_file

from sftmix.config.schema import Config, ModelConfig, ObjectiveConfig
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks
from sftmix.loss.objective import Objective
from sftmix.train.example_weights import weigh_examples

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])


def write_threads():
    """Writes the names of the threads that are left when Python ends."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    result_path.with_suffix(f".threads-{os.environ['RANK']}").write_text(" ".join(sorted(names)))


atexit.register(write_threads)  # the first that is registered is the last that is called
ranks = init_ranks()
tokenizer = tokenizer_from(folder / "tokenizer")

# For each rank its micro-batches, each a list of pairs.
LAYOUTS = {
    1: {"1 x 4": [[[0], [1], [2], [3]]]},
    2: {
        "2 x 2": [[[0], [1]], [[2], [3]]],
        "2 x 1": [[[0, 3]], [[1, 2]]],
        "one rank without a response token": [[[0, 1, 2, 3]], [[]]],
        "one rank without a response token at times": [[[2], [0, 1]], [[3], []]],
    },
}


def config_for(stage, model, **engine):
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {"path": str(folder / model)},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"generator": {}},
            "train": {"learning_rate": 1e-2},
            "engine": {"zero_stage": stage, "precision": "fp32", **engine},
        }
    )


def train_steps(engine, layout, objective):
    """Takes three steps; returns the NTP and Mixup loss and the gradient norm of each."""
    steps = []
    for step in (1, 2, 3):
        engine.start_step(seed=0, step=step)
        pieces = layout[ranks.rank]
        sums = torch.zeros(2, dtype=torch.float64)
        batches = [micro_batch(piece, mixes_inputs=objective.mixes_inputs) for piece in pieces]
        weighed = weigh_examples(engine, batches, COUNTS, objective.next_token)
        for number, batch in enumerate(weighed, start=1):
            loss = engine.forward_backward(batch, COUNTS, objective, is_last=number == len(pieces))
            sums += torch.stack([loss.ntp, loss.mixup]).double()
        norm = float(engine.step(learning_rate=1e-2))
        steps.append([*ranks.sum(sums).tolist(), norm])
    return steps


def close(engine):
    """Closes an engine, of which nothing may stay: the next would find no room."""
    engine.close()
    gc.collect()
    left = sum(isinstance(thing, torch.nn.Parameter) for thing in gc.get_objects())
    assert left == 0, f"{left} parameters outlive their engine"


results = {}
for stage in (0, 1, 2, 3):
    for model in ("tied", "untied"):
        config = config_for(stage, model)
        for name, layout in LAYOUTS[ranks.world_size].items():
            engine = Engine(config, config.model, ranks, tokenizer, train=config.train)
            if stage == 3:  # what was loaded is the file's content, tensor by tensor
                file = load_file(folder / model / "model.safetensors")
                loaded = {n: t.clone() for n, t in engine.named_tensors()}
                assert set(loaded) == set(file), set(loaded) ^ set(file)
                assert all(torch.equal(loaded[n], file[n]) for n in file), (
                    "a loaded tensor differs from the file"
                )
            results[f"{stage} {model} {name}"] = train_steps(engine, layout, Objective(0.4))
            if name in ("1 x 4", "2 x 2"):
                export = folder / f"exported-{stage}-{model}-{ranks.world_size}"
                engine.export(export, tokenizer)
                logits = engine.logits(micro_batch([0, 2]))
                if ranks.is_main:
                    torch.save(logits, export / "logits.pt")
            close(engine)

# Padded, and with activations computed again, on the same cuts.
for stage in (0, 3):
    for name, options in {
        "padded": {"packing": "off"},
        "recomputed": {"activation_checkpointing": True},
    }.items():
        config = config_for(stage, "untied", **options)
        for layout_name, layout in LAYOUTS[ranks.world_size].items():
            engine = Engine(config, config.model, ranks, tokenizer, train=config.train)
            assert engine.packs == (name != "padded")
            results[f"{name} {stage} {layout_name}"] = train_steps(engine, layout, Objective(0.4))
            close(engine)

# Other losses of next tokens, whose weights must not depend on how a step is divided.
OTHERS = {
    "dft": Objective(0.4, next_token=ObjectiveConfig(weighting="dft", label_smoothing=0.1)),
    "ir_dro": Objective(next_token=ObjectiveConfig(weighting="ir_dro", ir_dro_temperature=0.5)),
}
for stage in (0, 3):
    for kind, objective in OTHERS.items():
        for name, layout in LAYOUTS[ranks.world_size].items():
            config = config_for(stage, "untied")
            engine = Engine(config, config.model, ranks, tokenizer, train=config.train)
            results[f"{kind} {stage} {name}"] = train_steps(engine, layout, objective)
            close(engine)

# Mixing at the input embeddings: a third forward on every rank, over nothing where a rank has no
# pair.
for stage in (0, 3):
    for model in ("tied", "untied"):
        config = config_for(stage, model)
        for name, layout in LAYOUTS[ranks.world_size].items():
            engine = Engine(config, config.model, ranks, tokenizer, train=config.train)
            results[f"inputs {stage} {model} {name}"] = train_steps(
                engine, layout, Objective(0.4, "input_embeddings")
            )
            close(engine)

# A scoring engine reads what another one wrote.
engine = Engine(config_for(3, "tied"), ModelConfig(path=str(folder / "tied")), ranks, tokenizer)
nll = engine.score(micro_batch([0, 1, 2, 3])).nll
if ranks.is_main:
    torch.save(nll, folder / f"nll-{ranks.world_size}.pt")
    result_path.write_text(json.dumps(results))
close(engine)
