"""Mixtures of experts on two ranks whose tokens use other experts: no rank hangs under ZeRO-3, and
losses and gradient norms are those of one process."""

import json
from pathlib import Path

import pytest
from pairs import results_of_each

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "moe_worker.py"
KINDS = ["mixtral", "qwen3_moe", "list"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    # With the default threshold weights as small as these stay whole on every rank.
    sharded = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.json").write_text(json.dumps(sharded))
    return results_of_each(WORKER, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_use_other_experts(results, kind):
    """Else the test would show nothing."""
    first, second = results[1][f"{kind} experts"]
    assert not set(first) & set(second)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process_does(results, kind, stage):
    expected = results[1][f"{kind} 0"]
    assert expected[0][0] > expected[1][0]
    for num_ranks in (1, 2):
        found = results[num_ranks][f"{kind} {stage}"]
        assert found == [pytest.approx(step, rel=1e-4) for step in expected], num_ranks
