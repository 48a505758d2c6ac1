"""Prints what a step keeps alive and sends, on real ranks or in a world that is not there.

python fake_world_worker.py CONFIG [WORLD_SIZE]: without a size, on real ranks.
"""

import json
import sys

from sftmix.batches.cut import StepCounts
from sftmix.config.reader import load_config
from sftmix.engine.fake_world import join_fake_world, trace, without_contents
from sftmix.engine.process_group import init_ranks
from sftmix.planning.trace_worker import pair_of

LENGTH, RESPONSE = 251, 127  # primes: they divide nothing that has no tokens


def main():
    config = load_config(sys.argv[1], [])
    batch, counts = pair_of(LENGTH, RESPONSE), StepCounts(2 * RESPONSE, RESPONSE)
    if len(sys.argv) > 2:
        ranks = join_fake_world(int(sys.argv[2]))
        with without_contents():
            found = trace(config, ranks, batch, counts)
    else:
        ranks = init_ranks()
        found = trace(config, ranks, batch, counts)
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
