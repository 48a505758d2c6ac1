"""Runs on every rank: trains mixtures of experts of which each rank's tokens use other experts, and
writes what it saw (rank 0).

Arguments: a folder with `tokenizer/`; a file to write. Each rank trains on one token, many times
over, so that its router chooses the same few experts for all.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.cut import StepCounts
from sftmix.config.schema import Config
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks
from sftmix.loss.objective import Objective

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
ranks = init_ranks()
tokenizer = tokenizer_from(folder / "tokenizer")
SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "router_aux_loss_coef": 0.0,
    "num_experts_per_tok": 1,
}


class ListMixtralConfig(MixtralConfig):
    model_type = "list_mixtral"


class ListOfExperts(nn.Module):
    """Experts as modules of their own, of which only those run that a token has chosen: the code of
    older models and of many outside of transformers."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.hidden_size, config.intermediate_size),
                nn.SiLU(),
                nn.Linear(config.intermediate_size, config.hidden_size),
            )
            for _ in range(config.num_local_experts)
        )

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        shares = self.gate(flat).softmax(-1)
        chosen = shares.argmax(-1)
        output = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            expert = self.experts[number](flat[rows]) * shares[rows, number, None]
            output = output.index_add(0, rows, expert)
        return output.view_as(hidden)


class ListMixtralForCausalLM(MixtralForCausalLM):
    config_class = ListMixtralConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListOfExperts(config)


AutoConfig.register("list_mixtral", ListMixtralConfig)
AutoModelForCausalLM.register(ListMixtralConfig, ListMixtralForCausalLM)
KINDS = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 16},
    "list": {"model_type": "list_mixtral", "num_local_experts": 4},
}
TOKENS = (7, 40)  # of the two ranks
NUM_RESPONSE = 5


def batch_of(tokens):
    mask = np.arange(8) >= 8 - NUM_RESPONSE
    examples = [(np.full(8, token, dtype=np.int32), mask) for token in tokens]
    return build_micro_batch(examples, [], indices=tuple(range(len(examples))), pad_id=0)


def experts_used(model_folder, token):
    """Returns the experts of the first layer that a row of this token uses."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    seen = []
    block = model.model.layers[0].mlp

    def note(module, inputs, output):
        scores = output if isinstance(output, torch.Tensor) else output[0]
        seen.extend(scores.reshape(-1, scores.shape[-1]).argmax(-1).tolist())

    block.gate.register_forward_hook(note)
    model(input_ids=torch.full((1, 8), token))
    return sorted(set(seen))


results = {}
for kind, settings in KINDS.items():
    saved = folder / f"{kind}-{ranks.world_size}"
    if ranks.is_main:
        torch.manual_seed(3)
        config = AutoConfig.for_model(**{**SMALL, **settings})
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.mul_(50)  # away from a tie
        model.save_pretrained(saved)
    ranks.barrier()
    for stage in (0, 3):
        raw = {
            "run": {"dir": str(folder / "run")},
            "model": {"path": str(saved)},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"generator": {}},
            "train": {"learning_rate": 1e-2},
            "engine": {
                "zero_stage": stage,
                "precision": "fp32",
                "deepspeed": str(folder / "zero3.json") if stage == 3 else None,
            },
        }
        run = Config.model_validate(raw)
        engine = Engine(run, run.model, ranks, tokenizer, train=run.train)
        tokens = TOKENS if ranks.world_size == 1 else TOKENS[ranks.rank :][:1]
        steps = []
        for step in (1, 2):
            engine.start_step(seed=0, step=step)
            counts = StepCounts(2 * NUM_RESPONSE, 0)
            loss = engine.forward_backward(batch_of(tokens), counts, Objective(), is_last=True)
            norm = float(engine.step(learning_rate=1e-2))
            steps.append([float(ranks.sum(loss.ntp.double().reshape(1))), norm])
        results[f"{kind} {stage}"] = steps
        engine.close()
    results[f"{kind} experts"] = [experts_used(saved, token) for token in TOKENS]
if ranks.is_main:
    result_path.write_text(json.dumps(results))
