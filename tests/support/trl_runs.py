"""TRL's trainer on eight examples, one step of gradient descent: for the tests, and as a process of
theirs. Arguments: a folder, and the name of a DeepSpeed JSON or nothing."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from families import FAMILIES
from naive import model_from
from tokenizers_for_tests import character_tokenizer

from sftmix.integrations.trl import SFTMixConfig, SFTMixTrainer

# (tokens, response tokens) of eight examples, of which micro-batches of two make one step
LENGTHS = [(12, 7), (9, 3), (6, 5), (14, 2), (8, 4), (10, 6), (7, 3), (11, 5)]
MU = 0.4


def tokenised():
    """Eight examples, of which the even ones are confident."""
    rng = np.random.default_rng(0)
    rows = []
    for number, (length, response) in enumerate(LENGTHS):
        ids = rng.integers(3, 97, length)
        labels = np.where(np.arange(length) < length - response, -100, ids)
        confidence = -1.0 - number / 10 - 5 * (number % 2)
        rows.append(
            {"input_ids": ids.tolist(), "labels": labels.tolist(), "confidence": confidence}
        )
    return Dataset.from_list(rows)


def settings(folder, **changes):
    return SFTMixConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "mixup_weight": MU,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "learning_rate": 1.0,
            "save_strategy": "no",
            "disable_tqdm": True,
            **changes,
        }
    )


def trainer_of(model, folder, data=None, *, peft_config=None, **changes):
    return SFTMixTrainer(
        model,
        settings(folder, **changes),
        train_dataset=tokenised() if data is None else data,
        processing_class=character_tokenizer(),
        peft_config=peft_config,
    )


if __name__ == "__main__":
    folder, *deepspeed = sys.argv[1:]
    ranks = int(os.environ["WORLD_SIZE"])
    options = {"gradient_accumulation_steps": 4 // ranks, "deepspeed": (deepspeed or [None])[0]}
    # before the settings, which would divide it among ranks: its noise is added to whole weights
    model = model_from(FAMILIES["llama"][0], dtype=torch.float32)
    trainer = trainer_of(model, folder, **options)
    trainer.train()
    trainer.save_model(folder)
    if trainer.is_world_process_zero():
        logged = next(entry for entry in trainer.state.log_history if "ntp_loss" in entry)
        torch.save(logged, Path(folder) / "logged.pt")
