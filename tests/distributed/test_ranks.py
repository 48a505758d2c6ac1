"""Loss, gradient norm and weights do not depend on how a step is cut up: real processes, ZeRO
stages 0 to 3."""

from pathlib import Path

import pytest
import torch
from pairs import COUNTS, PAIRS, micro_batch, results_of
from transformers import AutoModelForCausalLM

from sftmix.batches.collate import build_micro_batch

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "ranks_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, results_of(WORKER, folder)


LAYOUTS = [
    "2 x 2",
    "2 x 1",
    "one rank without a response token",
    "one rank without a response token at times",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_cut_gives_the_losses_and_gradient_norms_of_one_process(
    results, stage, model, layout
):
    _, found = results
    expected = found[f"{stage} {model} 1 x 4"]
    assert found[f"{stage} {model} {layout}"] == [
        pytest.approx(step, rel=1e-5) for step in expected
    ]


@pytest.mark.parametrize("layout", ["1 x 4", *LAYOUTS])
@pytest.mark.parametrize("kind", ["padded", "recomputed"])
@pytest.mark.parametrize("stage", [0, 3])
def test_padding_and_recomputation_change_nothing(results, stage, kind, layout):
    _, found = results
    assert found[f"{kind} {stage} {layout}"] == [
        pytest.approx(step, rel=1e-5) for step in found["0 untied 1 x 4"]
    ]


@pytest.mark.parametrize("layout", ["1 x 4", *LAYOUTS])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["dft", "ir_dro"])
def test_other_losses_of_next_tokens_do_not_depend_on_the_cut(results, kind, stage, layout):
    _, found = results
    expected = found[f"{kind} 0 1 x 4"]
    assert found[f"{kind} {stage} {layout}"] == [pytest.approx(step, rel=1e-5) for step in expected]
    # it trains another model: the same loss before the first step, another one after it
    plain = found["0 untied 1 x 4"]
    assert expected[0][0] == pytest.approx(plain[0][0])
    assert expected[-1][0] != pytest.approx(plain[-1][0], rel=1e-4)


def test_ir_dro_has_the_gradient_of_its_definition(results):
    folder, found = results
    model = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float64)
    means = []
    for member in [m for pair in PAIRS for m in pair[:2]]:
        batch = build_micro_batch([member], [], indices=(0,), pad_id=0)
        logits = model(input_ids=batch.input_ids).logits[0]
        means.append(torch.nn.functional.cross_entropy(logits[batch.rows], batch.labels))
    losses = torch.stack(means)
    weights = torch.softmax(losses.detach() / 0.5, dim=0)
    assert weights.max() > 1.05 * weights.min()  # else a plain mean would pass
    (weights * losses).sum().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert found["ir_dro 3 2 x 2"][0][2] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("stage", [0, 3])
def test_mixing_at_the_input_does_not_depend_on_the_cut_either(results, stage, model, layout):
    _, found = results
    expected = found[f"inputs 0 {model} 1 x 4"]
    assert found[f"inputs {stage} {model} {layout}"] == [
        pytest.approx(step, rel=1e-5) for step in expected
    ]
    at_head = found[f"0 {model} 1 x 4"][0]
    assert expected[0][0] == pytest.approx(at_head[0]) and expected[0][1] != pytest.approx(
        at_head[1], rel=1e-6
    )


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_losses_of_stage_0(results, stage, model):
    _, found = results
    assert found[f"{stage} {model} 1 x 4"] == [
        pytest.approx(step, rel=1e-5) for step in found[f"0 {model} 1 x 4"]
    ]


# else the comparisons above would show nothing about updates
def test_the_steps_differ_from_each_other(results):
    for steps in results[1].values():
        assert steps[0][0] > steps[1][0] > steps[2][0]


def test_the_first_losses_equal_a_plain_model(results):
    folder, found = results
    model = AutoModelForCausalLM.from_pretrained(folder / "untied")
    total = count = 0.0
    for member in [m for pair in PAIRS for m in pair[:2]]:
        batch = build_micro_batch([member], [], indices=(0,), pad_id=0)
        logits = model(input_ids=batch.input_ids).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits[batch.rows], batch.labels, reduction="sum"
        ).item()
        count += batch.labels.numel()
    assert count == COUNTS.num_ntp_tokens
    assert found["3 untied 1 x 4"][0][0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_exported_model_gives_the_engines_logits(results, stage, model, num_ranks):
    folder, _ = results
    export = folder / f"exported-{stage}-{model}-{num_ranks}"
    loaded = AutoModelForCausalLM.from_pretrained(export)
    is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert is_tied == (model == "tied")
    batch = micro_batch([0, 2])
    with torch.no_grad():
        logits = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = torch.load(export / "logits.pt", weights_only=True)
    real = batch.attention_mask.bool()
    assert torch.allclose(logits[real], expected[0], rtol=1e-5, atol=1e-6)  # one after another


def test_scores_do_not_depend_on_the_number_of_ranks(results):
    folder, _ = results
    one, two = (torch.load(folder / f"nll-{n}.pt", weights_only=True) for n in (1, 2))
    assert torch.equal(one, two) and len(one)


@pytest.mark.parametrize("rank", [0, 1])
def test_no_thread_of_the_process_group_outlives_it(results, rank):
    """One that drops the last reference to a tensor when Python is torn down aborts the process,
    though all its work is done."""
    folder, _ = results
    left = (folder / f"2.threads-{rank}").read_text()
    assert "gloo" not in left and "tcpstore" not in left, left
