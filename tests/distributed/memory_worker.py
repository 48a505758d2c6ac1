"""Runs on every rank: loads a model under ZeRO-3, exports it, and writes by how much the memory of
each rank grew at most (rank 0).

Arguments: a folder with `tokenizer/`, `model/`, `small/` and `little_live.json`; a file to write.
"""

import json
import sys
from pathlib import Path

import torch

from sftmix.config.deepspeed_json import deepspeed_config
from sftmix.config.schema import Config
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.loading import build_model, hf_config
from sftmix.engine.process_group import init_ranks

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def growth(action):
    """Returns what an action returns, and the most bytes by which this process was larger."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present size
    before = memory("VmRSS")
    done = action()
    return done, memory("VmHWM") - before


def run_on(model):
    raw = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model)},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"generator": {}},
        "engine": {
            "zero_stage": 3,
            "precision": "fp32",
            "deepspeed": str(folder / "little_live.json"),
        },
    }
    return Config.model_validate(raw)


ranks = init_ranks()
tokenizer = tokenizer_from(folder / "tokenizer")
small, config = run_on(folder / "small"), run_on(folder / "model")
Engine(small, small.model, ranks, tokenizer).close()  # what DeepSpeed needs once
hf = hf_config(config.model)
settings = deepspeed_config(
    config, precision="fp32", world_size=ranks.world_size, max_grad_norm=1.0
)
_, loading = growth(
    lambda: build_model(
        config.model,
        hf,
        dtype=torch.float32,
        seed=0,
        is_sharded=True,
        deepspeed_config=settings,
    )
)
engine = Engine(config, config.model, ranks, tokenizer)
_, exporting = growth(lambda: engine.export(folder / f"export-{ranks.world_size}", tokenizer))
found = ranks.gather_texts(json.dumps({"loading": loading, "exporting": exporting}))
if ranks.is_main:
    result_path.write_text(json.dumps([json.loads(text) for text in found]))
