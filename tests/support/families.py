"""Small random models of the architectures that the loss is tested on."""

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {
    **SIZES,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (config for AutoConfig.for_model, what the model does to its logits behind the head)
FAMILIES = {
    "llama": ({"model_type": "llama", **GROUPED}, {}),
    "llama-tied": ({"model_type": "llama", "tie_word_embeddings": True, **GROUPED}, {}),
    "mistral": ({"model_type": "mistral", **GROUPED}, {}),
    "qwen2": ({"model_type": "qwen2", **GROUPED}, {}),
    "qwen3": ({"model_type": "qwen3", "head_dim": 8, **GROUPED}, {}),
    "gemma2": (
        {
            "model_type": "gemma2",
            "head_dim": 8,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
            **GROUPED,
        },
        {"softcap": 5.0},
    ),
    "phi3": ({"model_type": "phi3", **GROUPED}, {}),
    "gpt2": (
        {
            "model_type": "gpt2",
            "vocab_size": 97,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {},
    ),
    "gpt-neox": (
        {
            "model_type": "gpt_neox",
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **SIZES,
        },
        {},
    ),
    "phi-head-with-bias": ({"model_type": "phi", **GROUPED}, {}),
    "cohere-scaled-logits": (
        {"model_type": "cohere", "logit_scale": 0.25, **GROUPED},
        {"scale": 0.25},
    ),
    "granite-divided-logits": (
        {"model_type": "granite", "logits_scaling": 4.0, **GROUPED},
        {"scale": 0.25},
    ),
    "mixtral-moe": (
        {
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.02,
            **GROUPED,
        },
        {},
    ),
}
