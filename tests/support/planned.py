"""A small model to plan for."""

import json

from sftmix.config.reader import load_config

SIZES = {
    "model_type": "llama",
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}


def config_of(zero, *overrides, layers=2):
    architecture = json.dumps({**SIZES, "num_hidden_layers": layers})
    return load_config(
        "quickstart",
        [
            f"model.architecture={architecture}",
            "engine.precision=bf16",
            f"engine.deepspeed={zero}",
            *overrides,
        ],
    )
