"""What is refused before a run: states that are larger than the memory."""

import pytest

from sftmix.cluster import environment
from sftmix.config.reader import load_config
from sftmix.errors import ConfigError
from sftmix.pipeline import preflight
from sftmix.planning.states import Need, why_too_large

GIB = 2**30
SIZES = (
    "{model_type: llama, vocab_size: 1000, hidden_size: 512, intermediate_size: 1024,"
    " num_hidden_layers: 2, num_attention_heads: 8}"
)


def need_of(num_ranks, *overrides):
    given = [f"model.architecture={SIZES}", "engine.precision=bf16", *overrides]
    return Need(load_config("quickstart", given), num_ranks, num_ranks)


def test_states_alone_are_compared_with_a_gpu():
    """18 bytes a parameter, over the ranks from ZeRO-3 on."""
    need = need_of(1, "engine.zero_stage=3")
    exact = 18 * need.num_parameters
    assert why_too_large(need, gpu_bytes=exact, machine=100 * GIB) is None
    said = why_too_large(need, gpu_bytes=exact - 1, machine=100 * GIB)
    assert said is not None and "1 rank keeps" in said and "a GPU here has" in said
    shared = need_of(4, "engine.zero_stage=3")
    assert why_too_large(shared, gpu_bytes=exact // 4 + 16, machine=100 * GIB) is None


def test_on_a_cpu_all_ranks_share_the_memory():
    need = need_of(2, "engine.zero_stage=0")
    needed = need.host_bytes(has_gpu=False)
    assert needed > 2 * 18 * need.num_parameters  # each rank has all of it, and one loads the model
    assert why_too_large(need, gpu_bytes=None, machine=needed) is None
    said = why_too_large(need, gpu_bytes=None, machine=needed - 1)
    assert said is not None and "of this machine's memory for 2 ranks" in said


def test_a_run_that_cannot_fit_is_refused_before_it_starts(monkeypatch):
    config = load_config("quickstart")
    preflight.check_memory(config)
    monkeypatch.setattr(environment, "machine_bytes", lambda: (1 << 20, 1 << 20))
    with pytest.raises(ConfigError, match="it has 1.0 MiB.*sftmix plan CONFIG --gpus N"):
        preflight.check_memory(config)
    monkeypatch.setenv("WORLD_SIZE", "1000000")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="for 1,000,000 ranks"):  # rank 0 loads the whole model
        preflight.check_memory(config)
