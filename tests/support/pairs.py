"""Four pairs whose response lengths differ much, between and within pairs, and models and a
tokenizer for them."""

import json
from pathlib import Path

import numpy as np
import torch
from processes import run_ranks
from tokenizers_for_tests import character_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.cut import StepCounts
from sftmix.data.template import ALPACA

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
    return build_micro_batch(
        examples, partners, indices=tuple(range(len(examples))), pad_id=0, mixes_inputs=mixes_inputs
    )


def results_of(worker: Path, folder: Path, numbers_of_ranks: tuple[int, ...] = (1, 2)) -> dict:
    """Runs a worker on each number of ranks, on a folder with `tokenizer/` and the models `tied/`
    and `untied/`; returns what they wrote."""
    for name in ("tied", "untied"):
        torch.manual_seed(1)
        config = AutoConfig.for_model(
            "llama",
            vocab_size=99,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=name == "tied",
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    found: dict = {}
    for result in results_of_each(worker, folder, numbers_of_ranks).values():
        found |= result
    return found


def results_of_each(worker: Path, folder: Path, numbers_of_ranks: tuple[int, ...] = (1, 2)) -> dict:
    """Runs a worker on each number of ranks, on a folder with `tokenizer/`; returns what each of
    them wrote, by that number."""
    character_tokenizer(chat_template=ALPACA).save_pretrained(folder / "tokenizer")
    found = {}
    for num_ranks in numbers_of_ranks:
        run_ranks(worker, num_ranks, str(folder), str(folder / f"{num_ranks}.json"))
        found[num_ranks] = json.loads((folder / f"{num_ranks}.json").read_text())
    return found
