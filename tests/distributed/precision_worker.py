"""Runs on every rank: builds engines while DeepSpeed's accelerator claims to know other precisions
than this machine does, and writes the dtypes that it finds, or the error (rank 0).

Arguments: a folder with `tokenizer/`, `tied/`, `untied/`; a file to write.
"""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from pairs import COUNTS, micro_batch
from safetensors.torch import load_file

from sftmix.config.schema import Config
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.deepspeed_internals import import_deepspeed
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks
from sftmix.engine.state import to_universal
from sftmix.errors import SftmixError
from sftmix.loss.objective import Objective

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
ranks = init_ranks()
tokenizer = tokenizer_from(folder / "tokenizer")
deepspeed = import_deepspeed()
accelerator = type(deepspeed.accelerator.get_accelerator())
SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# Gemma keeps a scale in a buffer, which follows the weights; its rotary frequencies do not.
GEMMA = {"architecture": {"model_type": "gemma3_text", **SMALL, "sliding_window": 16}}
LLAMA = [("llama", None)]
KINDS = [*LLAMA, ("gemma", GEMMA)]
SEVERAL_DTYPES = "the tensors have several dtypes"
results = {}


def simulated(fp16, bf16):
    """An accelerator that reports these; None is what DeepSpeed's CPU says for a plain no."""
    return mock.patch.multiple(
        accelerator, is_fp16_supported=lambda self: fp16, is_bf16_supported=lambda self: bf16
    )


def engine_of(stage, precision, model=None, *, is_trained=True):
    raw = {
        "run": {"dir": str(folder / "run")},
        "model": model or {"path": str(folder / "tied")},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"generator": {}},
        "train": {"learning_rate": 1e-2},
        "engine": {"zero_stage": stage, "precision": precision},
    }
    config = Config.model_validate(raw)
    train = config.train if is_trained else None
    return Engine(config, config.model, ranks, tokenizer, train=train)


def take_step(engine):
    pieces = [[[0], [1], [2], [3]]] if ranks.world_size == 1 else [[[0], [1]], [[2], [3]]]
    engine.start_step(seed=0, step=1)
    for number, piece in enumerate(pieces[ranks.rank], start=1):
        is_last = number == len(pieces[ranks.rank])
        engine.forward_backward(micro_batch(piece), COUNTS, Objective(0.4), is_last=is_last)
    engine.step(learning_rate=1e-2)


def seen(engine):
    """Returns the dtypes of weights, of rotary frequencies, and of all that the optimiser holds."""
    weights = {str(tensor.dtype) for _, tensor in engine.named_tensors()}
    rotary = {str(b.dtype) for n, b in engine.module.named_buffers() if "inv_freq" in n}
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = {str(v.dtype) for s in inner.state.values() for k, v in s.items() if k != "step"}
    found = [weights, rotary, states]
    assert all(len(kinds) == 1 for kinds in found), f"{SEVERAL_DTYPES}: {found}"
    return [kinds.pop().removeprefix("torch.") for kinds in found]


def note(name, action):
    """Writes what an action returns, or the message of the error that it raises."""
    try:
        results[name] = action()
    except SftmixError as error:
        results[name] = f"{type(error).__name__}: {error}"


def train_and_export(stage, precision, model, name):
    engine = engine_of(stage, precision, model)
    take_step(engine)
    found = [engine.precision, *seen(engine)]
    export = folder / f"export-{name}-{ranks.world_size}"
    engine.export(export, tokenizer)
    if engine.has_adapters:
        engine.export_adapter(export / "adapter", tokenizer)
    engine.close()
    ranks.barrier()
    files = [*export.glob("*.safetensors"), *export.glob("adapter/*.safetensors")]
    stored = {str(tensor.dtype) for file in files for tensor in load_file(file).values()}
    written = json.loads((export / "config.json").read_text())["dtype"]
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(export)
    return [*found, sorted(stored), written]


def score(precision):
    engine = engine_of(3, precision, is_trained=False)
    engine.score(micro_batch([0]))
    found = engine.precision
    engine.close()
    return found


for fp16, bf16 in ((None, True), (None, False), (True, True)):
    with simulated(fp16, bf16):
        for precision in ("fp32", "bf16"):
            for stage in (0, 1, 2, 3):
                if (stage, precision) == (0, "bf16"):  # refused before a run starts
                    continue
                for kind, model in KINDS if (fp16, bf16) == (None, True) else LLAMA:
                    name = f"{fp16} {bf16} {precision} {stage} {kind}"
                    arguments = (stage, precision, model, name.replace(" ", "-"))
                    note(name, lambda given=arguments: train_and_export(*given))
            note(f"{fp16} {bf16} {precision} score", lambda given=precision: score(given))

with simulated(None, True):
    lora = {"path": str(folder / "tied"), "lora": {"rank": 2}}
    for precision in ("fp32", "bf16"):
        for stage in (1, 3):
            name = f"lora {precision} {stage}"
            arguments = (stage, precision, lora, name.replace(" ", "-"))
            note(name, lambda given=arguments: train_and_export(*given))

# ---- what must not go unseen


def built_in_bf16():
    def wrong(self, ds_config, dtype):
        self.dtype = torch.bfloat16

    with mock.patch.object(deepspeed.zero.Init, "_set_dtype", wrong):
        engine_of(3, "fp32")


def states_in_bf16():
    plain = torch.optim.AdamW.step

    def wrong(self, *given, **named):
        plain(self, *given, **named)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16()

    with mock.patch.object(torch.optim.AdamW, "step", wrong):
        take_step(engine_of(0, "fp32"))


def loaded_in_bf16(*, is_universal):
    engine = engine_of(1, "fp32")
    take_step(engine)
    state = folder / f"state-{is_universal}-{ranks.world_size}"
    state.mkdir(exist_ok=True)
    ranks.barrier()
    engine.save_state(state).wait()
    ranks.barrier()
    if is_universal and ranks.is_main:
        to_universal(state, state.with_name(f"{state.name}-universal"))
    ranks.barrier()
    state = state.with_name(f"{state.name}-universal") if is_universal else state
    engine.close()
    again = engine_of(1, "fp32")
    plain = again._deepspeed.load_checkpoint

    def wrong(*given, **named):
        found = plain(*given, **named)
        for values in again.optimizer.optimizer.state.values():
            values["exp_avg_sq"] = values["exp_avg_sq"].bfloat16()
        return found

    again._deepspeed.load_checkpoint = wrong
    again.load_state(state, is_universal=is_universal)


def exported_in_bf16():
    engine = engine_of(1, "fp32")
    plain = engine.named_tensors

    def wrong():
        for name, tensor in plain():
            yield name, tensor.bfloat16() if name.endswith("up_proj.weight") else tensor

    engine.named_tensors = wrong
    engine.export(folder / "export-wrong", tokenizer)


note("built", built_in_bf16)
note("states", states_in_bf16)
note("loaded", lambda: loaded_in_bf16(is_universal=False))
note("loaded universal", lambda: loaded_in_bf16(is_universal=True))
note("exported", exported_in_bf16)
if ranks.is_main:
    result_path.write_text(json.dumps(results))
