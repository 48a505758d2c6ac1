"""Four pairs whose response lengths differ much, between and within pairs."""

import numpy as np

from sftmix.data.batches import StepCounts, build_micro_batch

rng = np.random.default_rng(0)


def example(length, responses):
    mask = np.zeros(length, dtype=bool)
    mask[length - responses :] = True
    return rng.integers(3, 90, length).astype(np.int32), mask


PAIRS = [
    (example(10, 2), example(12, 9), 0.2),
    (example(5, 1), example(6, 3), 0.9),
    (example(30, 25), example(8, 4), 0.5),
    (example(7, 2), example(7, 2), 0.01),
]
COUNTS = StepCounts(2 + 9 + 1 + 3 + 25 + 4 + 2 + 2, 2 + 1 + 4 + 2)


def micro_batch(numbers, *, mixes_inputs=False):
    examples = [member for n in numbers for member in PAIRS[n][:2]]
    partners = [(2 * place, 2 * place + 1, PAIRS[n][2]) for place, n in enumerate(numbers)]
    return build_micro_batch(examples, partners, indices=tuple(range(len(examples))), pad_id=0, mixes_inputs=mixes_inputs)
