"""Runs on every rank: trains models of vision and language on examples of which some have images,
and writes what it saw (rank 0).

Arguments: a folder with a model and prepared data of each family; a file to write. On two ranks the
first has the examples with images and the second those without.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from vision_models import FAMILIES

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.cut import StepCounts
from sftmix.batches.examples import TokenisedExamples
from sftmix.config.schema import Config
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks
from sftmix.loss.objective import Objective

folder, result_path = Path(sys.argv[1]), Path(sys.argv[2])
ranks = init_ranks()
OF_RANKS = ([0, 1], [2, 3])  # with images, without
LAM = 0.3


def batch_of(examples, parts):
    """One micro-batch of the pairs in `parts`."""
    indices = [i for part in parts for i in part]
    pairs = [(2 * n, 2 * n + 1, LAM) for n in range(len(parts))]
    return build_micro_batch(
        [examples.tokens(i) for i in indices],
        pairs,
        indices=tuple(indices),
        pad_id=0,
        images=examples.images(indices),
    )


results = {}
for family in FAMILIES:
    examples = TokenisedExamples(folder / f"{family}-data" / "train.arrow")
    parts = OF_RANKS if ranks.world_size == 1 else OF_RANKS[ranks.rank :][:1]
    batch = batch_of(examples, parts)
    count = int(examples.num_response_tokens.sum())
    num_mixed = int(ranks.sum(batch.lam.new_tensor([len(batch.lam)]).double()))
    for stage in (0, 2, 3):
        run = Config.model_validate(
            {
                "run": {"dir": str(folder / "run")},
                "model": {"path": str(folder / family)},
                "data": {"generator": {}},
                "engine": {
                    "zero_stage": stage,
                    "precision": "fp32",
                    "deepspeed": str(folder / "zero3.json") if stage == 3 else None,
                },
            }
        )
        tokenizer = tokenizer_from(folder / family)
        engine = Engine(run, run.model, ranks, tokenizer, train=run.train)
        before = {name: tensor.clone() for name, tensor in engine.named_tensors()}
        steps = []
        for step in (1, 2):
            engine.start_step(seed=0, step=step)
            loss = engine.forward_backward(
                batch, StepCounts(count, num_mixed), Objective(mixup_weight=0.2), is_last=True
            )
            norm = float(engine.step(learning_rate=1e-2))
            sums = ranks.sum(loss.loss.new_tensor([loss.ntp, loss.mixup]).double())
            steps.append([*sums.tolist(), norm])
        changed = sorted(n for n, t in engine.named_tensors() if not t.equal(before[n]))
        results[f"{family} {stage}"] = {"steps": steps, "changed": changed, "packs": engine.packs}
        engine.close()
if ranks.is_main:
    result_path.write_text(json.dumps(results))
