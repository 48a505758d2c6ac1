"""Held-out figures by transformers in float64, one example at a time: an independent reference."""

import torch
from transformers import AutoModelForCausalLM

from sftmix.batches.examples import TokenisedExamples


def held_out_tokens(model, data):
    """Yields, for each held-out example of a data stage, the log probabilities (T, V) at its
    response tokens and their labels (T,)."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for row in TokenisedExamples(data / "held_out.arrow").table:
        ids = torch.tensor(row["input_ids"])
        mask = torch.tensor(row["response_mask"]).bool()[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1][mask]
        yield logits.log_softmax(-1), ids[1:][mask]
