"""Overrides that shrink any config of the project to seconds on a CPU."""

TINY_TRAINING = [
    "train.epochs=1",
    "train.batch_size=8",
    "train.micro_batch_tokens=400",
    "log.every_steps=1",
    "engine.precision=fp32",
]
TINY_MODEL = [
    "model.path=",
    (
        "model.architecture={model_type: llama, hidden_size: 32, intermediate_size: 48,"
        " num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 512,"
        " tie_word_embeddings: true}"
    ),
]
TINY_DATA = [
    "data.path=",
    "data.generator={num_train: 61, num_held_out: 12, noisy_share: 0.2}",
    "tokenizer.train={vocab_size: 360}",
]
TINY = [*TINY_TRAINING, *TINY_MODEL, *TINY_DATA]
