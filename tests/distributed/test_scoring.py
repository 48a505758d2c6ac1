"""Scores equal a plain loop over the unmodified model, one example at a time, for any number of
ranks and both ways to hold the model; scores made inside a training run equal scores of its
checkpoints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from families import FAMILIES
from processes import run_ranks, sftmix, sftmix_on_ranks
from tiny import TINY
from tokenizers_for_tests import character_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from sftmix.confidence.scoring import WorkPlan, cut_by_length
from sftmix.data.template import ALPACA

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "score_worker.py"
QUICKSTART = "configs/quickstart.yaml"
MODELS = ["llama", "qwen2", "gemma2", "cohere-scaled-logits", "phi-head-with-bias"]
NUM_EXAMPLES = 14  # 5 units of 3, or 2 of 8


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    character_tokenizer(chat_template=ALPACA).save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(0)
    examples, expected = [], {}
    for _ in range(NUM_EXAMPLES):
        length = int(rng.integers(4, 30))
        mask = np.arange(length) >= length - int(rng.integers(1, length - 1))
        examples.append((rng.integers(3, 97, length).tolist(), mask.tolist()))
    (folder / "examples.json").write_text(json.dumps(examples))
    for name in MODELS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[name][0])).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder / "models" / name)
        expected[name] = [plain_loss(model, ids, mask) for ids, mask in examples]
    results = {}
    for num_ranks in (1, 3):
        run_ranks(WORKER, num_ranks, str(folder), str(folder / f"{num_ranks}.json"))
        results[num_ranks] = json.loads((folder / f"{num_ranks}.json").read_text())
    return expected, results


@torch.no_grad()
def plain_loss(model, ids, mask):
    """Returns the loss in nats over one example's response tokens, and whether each is the
    likeliest token."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    at = [n for n in range(len(ids)) if mask[n]]
    log_p = torch.log_softmax(logits, dim=-1)
    return -sum(log_p[n - 1, ids[n]].item() for n in at), all(
        int(logits[n - 1].argmax()) == ids[n] for n in at
    )


@pytest.mark.parametrize("unit_examples", [3, 8])
@pytest.mark.parametrize("way", ["replicated", "zero3"])
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_scores_equal_a_plain_loop_over_the_unmodified_model(
    scored, model, num_ranks, way, unit_examples
):
    expected, results = scored
    nll_sum, is_exact = results[num_ranks][f"{model} {way} {unit_examples}"]
    assert nll_sum == pytest.approx([loss for loss, _ in expected[model]], rel=1e-5)
    assert is_exact == [exact for _, exact in expected[model]]


@pytest.mark.parametrize("unit_examples", [1, 4, 100])
@pytest.mark.parametrize("packs", [False, True])
def test_units_cover_every_example_once_and_keep_to_the_budget(unit_examples, packs):
    lengths = np.random.default_rng(0).integers(1, 60, 37)
    plan = WorkPlan(lengths, unit_examples, micro_batch_tokens=100)
    seen = [
        int(i)
        for unit in range(plan.num_units)
        for piece in plan.micro_batches(unit, packs=packs)
        for i in piece
    ]
    assert sorted(seen) == list(range(37))
    for unit in range(plan.num_units):
        for piece in plan.micro_batches(unit, packs=packs):
            assert set(piece) <= set(plan.examples(unit))
            padded = len(piece) * lengths[piece].max()
            assert len(piece) == 1 or (lengths[piece].sum() if packs else padded) <= 100
    assert len(cut_by_length(lengths, micro_batch_tokens=10**6, packs=packs)) == 1


OPTIONS = [
    *TINY,
    "train.epochs=3",
    "reference.num_checkpoints=3",
    "train.batch_size=16",
    "baseline.enabled=false",
]


def tables(folder, *path):
    where = folder.joinpath("confidence", *path)
    return (
        pq.read_table(where / "perplexity.parquet").to_pandas(),
        pq.read_table(where / "confidence.parquet").to_pandas(),
    )


@pytest.fixture(scope="module")
def all_modes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes") / "run"
    done = sftmix(
        "run", QUICKSTART, *OPTIONS, f"run.dir={folder}", "confidence.compare=[live,online]"
    )
    return folder, done.stdout


def test_live_scores_are_those_of_the_checkpoints(all_modes):
    folder, _ = all_modes
    (saved, _), (live, _) = tables(folder), tables(folder, "compared", "live")
    # bit for bit: same weights, same batches
    assert saved.drop(columns="perplexity").equals(live.drop(columns="perplexity"))


def test_online_scores_cover_every_epoch_and_rank_like_the_checkpoints(all_modes):
    folder, output = all_modes
    (saved, mean), (online, online_mean) = tables(folder), tables(folder, "compared", "online")
    assert sorted(set(online["checkpoint"])) == sorted(set(saved["checkpoint"])) == [4, 8, 12]
    assert len(online) == 3 * 61 and (online["nll_sum"] > 0).all()
    assert mean["confidence"].rank().corr(online_mean["confidence"].rank()) > 0.3
    assert "online" in output and "live" in output  # the report says how far they agree


def test_scoring_inside_the_run_leaves_the_training_as_it_is(all_modes, tmp_path):
    sftmix("data", QUICKSTART, *OPTIONS, f"run.dir={tmp_path / 'run'}")
    sftmix("reference", QUICKSTART, *OPTIONS, f"run.dir={tmp_path / 'run'}")
    plain, scored_too = (
        sorted((folder / "reference" / "checkpoints").glob("*/model.safetensors"))
        for folder in (tmp_path / "run", all_modes[0])
    )
    assert len(plain) == 3
    for a, b in zip(plain, scored_too, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_the_first_epochs_of_online_scores_can_be_left_out(all_modes):
    folder, _ = all_modes
    later = [
        "confidence.mode=online",
        "confidence.compare=[checkpoints,live]",
        "confidence.online_from_epoch=2",
    ]
    shutil.copytree(folder, copy_of := folder.with_name("later"))
    sftmix("score", QUICKSTART, *OPTIONS, f"run.dir={copy_of}", *later, "--force")
    _, everything = tables(folder, "compared", "online")
    perplexities, mean = tables(copy_of)
    assert sorted(set(perplexities["checkpoint"])) == [8, 12]
    expected = -perplexities.groupby("example_id")["perplexity"].mean()
    assert np.allclose(
        mean.set_index("example_id")["confidence"].loc[expected.index], expected, rtol=1e-12
    )
    assert not np.allclose(mean["confidence"], everything["confidence"])
    too_late = [*later[:2], "confidence.online_from_epoch=4", "--force"]
    refused = sftmix("score", QUICKSTART, *OPTIONS, f"run.dir={copy_of}", *too_late, check=False)
    assert (
        refused.returncode == 2
        and "`confidence.online_from_epoch` is 4, and the last epoch of the reference run is 3"
        in refused.stderr
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_online_scores_are_the_losses_of_the_weights_that_saw_the_batch(tmp_path, num_ranks):
    """With a learning rate that moves nothing they are the losses of the first weights, in every
    epoch and on any rank."""
    options = [
        *OPTIONS,
        f"run.dir={tmp_path / 'run'}",
        "train.learning_rate=1e-30",
        "confidence.mode=online",
        "confidence.compare=[live]",
    ]
    sftmix("data", QUICKSTART, *options)
    for stage in ("reference", "score"):
        sftmix_on_ranks(num_ranks, stage, QUICKSTART, *options)
    # nothing is saved that no mode reads
    assert not (tmp_path / "run" / "reference" / "checkpoints").exists()
    (online, _), (live, _) = tables(tmp_path / "run"), tables(tmp_path / "run", "compared", "live")
    np.testing.assert_allclose(online["nll_sum"], live["nll_sum"], rtol=1e-5)


def test_given_models_take_the_place_of_a_reference_run(all_modes, tmp_path):
    folder, _ = all_modes
    checkpoints = [
        str(path) for path in sorted((folder / "reference" / "checkpoints").iterdir())[1:]
    ]
    models = "confidence.models=[" + ", ".join(f"{{path: {path}}}" for path in checkpoints) + "]"
    done = sftmix("run", QUICKSTART, *OPTIONS, f"run.dir={tmp_path / 'run'}", models)
    assert not (tmp_path / "run" / "reference").exists() and "reference" not in done.stdout
    (saved, _), (given, _) = tables(folder), tables(tmp_path / "run")
    expected = saved[saved["checkpoint"] > 4]
    assert sorted(set(given["checkpoint"])) == [1, 2]
    assert given["nll_sum"].tolist() == expected["nll_sum"].tolist()


def test_a_published_table_takes_the_place_of_scoring(all_modes, tmp_path):
    folder, _ = all_modes
    shutil.copytree(folder / "confidence", tmp_path / "table")
    options = [*OPTIONS, f"run.dir={tmp_path / 'run'}", f"confidence.scores={tmp_path / 'table'}"]
    done = sftmix("run", QUICKSTART, *options)
    assert "reference" not in [
        line.split()[1] for line in done.stdout.splitlines() if line.startswith("[")
    ]
    ours, theirs = (
        pq.read_table(where / "pairing" / "split.parquet").to_pydict()
        for where in (tmp_path / "run", folder)
    )
    assert ours == theirs
    options = [
        *options,
        "data.generator={num_train: 60, num_held_out: 12, noisy_share: 0.2}",
        f"run.dir={tmp_path / 'other'}",
    ]
    refused = sftmix("run", QUICKSTART, *options, check=False)
    # trained on the data: it changed with it
    assert refused.returncode == 2 and "allow_differences=[tokenizer]" in refused.stderr
    refused = sftmix(
        "run", QUICKSTART, *options, "confidence.allow_differences=[tokenizer]", check=False
    )
    assert refused.returncode == 2 and "scores_that_do_not_fit.jsonl" in refused.stderr
