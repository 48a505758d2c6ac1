"""Prints what a step keeps alive and sends, on real ranks or in a world that is not there.

python fake_world_worker.py CONFIG [WORLD_SIZE]: without a size, on real ranks.
"""

import json
import sys

import torch

from sftmix.batches.collate import MicroBatch
from sftmix.batches.cut import StepCounts
from sftmix.config.reader import load_config
from sftmix.engine.fake_world import join_fake_world, trace, without_contents
from sftmix.engine.process_group import init_ranks

LENGTH, RESPONSE = 251, 127  # primes: they divide nothing that has no tokens


def pair():
    """Returns two examples, a response in each, mixed."""
    ids = torch.zeros(2, LENGTH, dtype=torch.int64)
    count = RESPONSE
    rows = torch.cat([torch.arange(count) + LENGTH - count - 1 + LENGTH * b for b in range(2)])
    zeros = torch.zeros(2 * count, dtype=torch.int64)
    first = torch.arange(count)
    return MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        rows=rows,
        labels=zeros,
        owner=zeros,
        pairs=torch.stack([first, first + count], dim=1),
        lam=torch.full((count,), 0.5),
        indices=(0, 1),
    ).packed()


def main():
    config = load_config(sys.argv[1], [])
    batch, counts = pair(), StepCounts(2 * RESPONSE, RESPONSE)
    if len(sys.argv) > 2:
        ranks = join_fake_world(int(sys.argv[2]))
        with without_contents():
            found = trace(config, ranks, batch, counts, has_two=True)
    else:
        ranks = init_ranks()
        found = trace(config, ranks, batch, counts, has_two=True)
    if ranks.is_main:
        counted = found.two
        print()
        print(
            json.dumps(
                {
                    "parameters": found.num_parameters,
                    "peaks": {name: peak.total for name, peak in counted.peaks.items()},
                    "purposes": {n: dict(p.by_purpose) for n, p in counted.peaks.items()},
                    "products": {
                        " ".join(map(str, k)): v for k, v in sorted(counted.products.items())
                    },
                    "moved": {" ".join(k): v for k, v in sorted(counted.moved.items())},
                    "calls": {" ".join(map(str, k)): v for k, v in sorted(counted.calls.items())},
                    "sent": {" ".join(map(str, k)): v for k, v in sorted(counted.sent.items())},
                }
            )
        )


main()
