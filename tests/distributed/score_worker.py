"""Runs on every rank: scores the examples of `examples.json` under every model folder, both ways,
and writes the sums (rank 0)."""

import json
import sys
from pathlib import Path

import numpy as np

from sftmix.confidence.scoring import WorkPlan, score_examples
from sftmix.config.schema import Config, ModelConfig
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
ranks = init_ranks()
tokenizer = tokenizer_from(folder / "tokenizer")
tokens = [
    (np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))
    for ids, mask in json.loads((folder / "examples.json").read_text())
]


class Examples:
    num_tokens = np.array([len(ids) for ids, _ in tokens])
    num_response_tokens = np.array([mask.sum() for _, mask in tokens])

    def images(self, indices):
        return None

    def tokens(self, index):
        return tokens[int(index)]

    def __len__(self):
        return len(tokens)


examples = Examples()
config = Config.model_validate(
    {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(folder / "llama")},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"generator": {}},
        "engine": {"zero_stage": 3, "precision": "fp32"},
    }
)
results = {}
for model in sorted(path.name for path in (folder / "models").iterdir()):
    for is_sharded in (False, True):
        engine = Engine(
            config,
            ModelConfig(path=str(folder / "models" / model)),
            ranks,
            tokenizer,
            is_sharded=is_sharded,
        )
        for unit_examples in (3, 8):  # more units than ranks, and fewer: ranks are left over
            plan = WorkPlan(examples.num_tokens, unit_examples, micro_batch_tokens=40)
            scores = score_examples(engine, examples, plan, pad_id=0, title="")
            results[f"{model} {'zero3' if is_sharded else 'replicated'} {unit_examples}"] = [
                scores.nll_sum.tolist(),
                scores.is_exact.tolist(),
            ]
        engine.close()
if ranks.is_main:
    result_path.write_text(json.dumps(results))
