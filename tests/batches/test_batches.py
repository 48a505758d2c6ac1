import itertools
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from matchings import match_parts, split_by_confidence

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.cut import count_step, cut_step
from sftmix.batches.examples import TokenisedExamples
from sftmix.confidence import scoring
from sftmix.confidence.scoring import cut_by_length
from sftmix.engine.ranks import Ranks
from sftmix.errors import DataError
from sftmix.train.plan import TrainingPlan


def make_matching(count=41, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"id{n}" for n in range(count)]
    parts = np.array(split_by_confidence(names, rng.random(count)))
    num_tokens, num_response_tokens = rng.integers(5, 60, count), rng.integers(1, 5, count)
    return (
        match_parts(parts, num_response_tokens, seed=seed, alpha=0.5),
        num_tokens,
        num_response_tokens,
    )


def make_plan(count=41, seed=0):
    matching, num_tokens, num_response_tokens = make_matching(count, seed)
    return matching.units(0, 0, matching.num_units), num_tokens, num_response_tokens


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
# less than any pair, a pair or two, several, all
@pytest.mark.parametrize("budget", [1, 100, 500, 10**6])
def test_every_unit_is_in_one_micro_batch_and_all_ranks_have_as_many(num_ranks, budget):
    plan, num_tokens, _ = make_plan()
    units = np.arange(3, 19)
    ranks = cut_step(plan, units, num_tokens, micro_batch_tokens=budget, num_ranks=num_ranks)
    assert len(ranks) == num_ranks and len({len(pieces) for pieces in ranks}) == 1
    assert (
        sorted(u for pieces in ranks for piece in pieces for u in piece.tolist()) == units.tolist()
    )
    for piece in (piece for pieces in ranks for piece in pieces if len(piece) > 1):
        members = plan.units[piece]
        members = members[members >= 0]
        assert len(members) * num_tokens[members].max() <= budget


@pytest.mark.parametrize("num_examples", range(1, 18))
def test_whatever_the_numbers_each_example_is_trained_on_once_in_an_epoch(num_examples):
    matching, num_tokens, _ = make_matching(num_examples)
    for num_ranks, batch_size, budget in itertools.product(
        [1, 2, 3, 4], [1, 2, 6, 10], [1, 100, 10**6]
    ):
        seen = []
        for epoch, start, stop in TrainingPlan(matching, 1, batch_size).steps():
            plan = matching.units(epoch, start, stop)
            ranks = cut_step(
                plan,
                np.arange(stop - start),
                num_tokens,
                micro_batch_tokens=budget,
                num_ranks=num_ranks,
            )
            assert len({len(pieces) for pieces in ranks}) == 1  # or a rank would wait for ever
            members = np.concatenate(
                [plan.units[piece].ravel() for pieces in ranks for piece in pieces]
            )
            seen += members[members >= 0].tolist()
        assert sorted(seen) == list(range(num_examples))


def test_ranks_get_nearly_equal_work():
    plan, num_tokens, _ = make_plan(400)
    ranks = cut_step(plan, np.arange(160), num_tokens, micro_batch_tokens=600, num_ranks=4)

    def work(pieces):
        return sum(
            int((plan.units[p] >= 0).sum() * num_tokens[plan.units[p][plan.units[p] >= 0]].max())
            for p in pieces
            if len(p)
        )

    loads = [work(pieces) for pieces in ranks]
    assert max(loads) <= 1.25 * min(loads)


def test_more_ranks_than_units_leave_some_empty():
    plan, num_tokens, _ = make_plan()
    ranks = cut_step(plan, np.arange(2), num_tokens, micro_batch_tokens=10**6, num_ranks=5)
    assert sorted(len(piece) for pieces in ranks for piece in pieces) == [0, 0, 0, 1, 1]


def example(length, responses, first=10):
    mask = np.zeros(length, dtype=bool)
    mask[responses] = True
    return np.arange(first, first + length, dtype=np.int32), mask


def test_rows_predict_the_response_tokens_and_pairs_align_from_the_first():
    confident = example(6, [3, 4, 5], first=10)
    unconfident = example(9, [2, 3, 7, 8], first=50)  # two turns: their tokens count through
    alone = example(4, [2, 3], first=80)
    batch = build_micro_batch(
        [confident, unconfident, alone], [(0, 1, 0.25)], indices=(7, 8, 9), pad_id=0
    )
    assert batch.input_ids.shape == (3, 9) and batch.attention_mask.sum(1).tolist() == [6, 9, 4]
    predicted = [batch.input_ids.flatten()[row + 1].item() for row in batch.rows]
    assert predicted == batch.labels.tolist() == [13, 14, 15, 52, 53, 57, 58, 82, 83]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    # min(3, 4) positions
    assert batch.labels[batch.pairs].tolist() == [[13, 52], [14, 53], [15, 57]]
    assert batch.lam.tolist() == [0.25] * 3 and batch.num_real_tokens == 19


def test_an_empty_micro_batch_carries_no_loss_and_no_token():
    batch = build_micro_batch([], [], indices=(), pad_id=3)
    assert batch.input_ids.tolist() == [[3]] and batch.attention_mask.tolist() == [[1]]
    assert (
        batch.rows.numel()
        == batch.labels.numel()
        == batch.lam.numel()
        == batch.num_real_tokens
        == 0
    )
    assert batch.pairs.shape == (0, 2)


def test_counts_of_a_step_are_the_sums_over_its_micro_batches():
    plan, num_tokens, num_response_tokens = make_plan()
    units = np.arange(0, 21)
    counts = count_step(plan, units, num_response_tokens)
    ntp = mixup = 0
    for pieces in cut_step(plan, units, num_tokens, micro_batch_tokens=200, num_ranks=2):
        for piece in pieces:
            tokens, partners = [], []
            for unit in piece:
                members = [int(m) for m in plan.units[unit] if m >= 0]
                if len(members) == 2:
                    partners.append((len(tokens), len(tokens) + 1, 0.5))
                tokens += [
                    example(
                        num_tokens[m], range(num_tokens[m] - num_response_tokens[m], num_tokens[m])
                    )
                    for m in members
                ]
            batch = build_micro_batch(tokens, partners, indices=tuple(range(len(tokens))), pad_id=0)
            ntp += batch.labels.numel()
            mixup += batch.pairs.shape[0]
    assert (counts.num_ntp_tokens, counts.num_mixup_tokens) == (ntp, mixup)


def test_scoring_units_cover_all_examples_within_the_budget():
    num_tokens = np.random.default_rng(0).integers(1, 90, 57)
    for packs in (False, True):
        units = cut_by_length(num_tokens, micro_batch_tokens=200, packs=packs)
        assert sorted(np.concatenate(units).tolist()) == list(range(57))
        sizes = [
            num_tokens[unit].sum() if packs else len(unit) * num_tokens[unit].max()
            for unit in units
        ]
        assert max(sizes) <= 200 and all(
            size + num_tokens[after[0]] * (1 if packs else len(unit)) > 200 - 90
            for size, unit, after in zip(sizes, units, units[1:], strict=False)
        )


def test_examples_of_several_turns_are_refused_where_inputs_are_mixed(tmp_path):
    masks = {
        "one": [0, 0, 1, 1],
        "at the end": [0, 1],
        "two": [0, 1, 0, 1, 1],
        "all": [1, 1],
        "three": [1, 0, 1, 0, 1],
    }
    rows = [
        {
            "example_id": name,
            "input_ids": mask,
            "response_mask": [bool(m) for m in mask],
            "num_tokens": len(mask),
            "num_response_tokens": sum(mask),
        }
        for name, mask in masks.items()
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "all")
    datasets.Dataset.from_list(
        [row for row in rows if row["example_id"] not in ("two", "three")]
    ).save_to_disk(tmp_path / "single")
    TokenisedExamples(next((tmp_path / "single").glob("*.arrow"))).check_single_spans()
    with pytest.raises(DataError, match=r"2 examples have several \(of 5\), first two"):
        TokenisedExamples(next((tmp_path / "all").glob("*.arrow"))).check_single_spans()


# of 5 examples in 2 units, after the first of 3
@pytest.mark.parametrize(("num_ranks", "expected"), [(1, 3), (2, 5)])
def test_the_rates_of_scoring_count_no_more_than_there_is(monkeypatch, num_ranks, expected):
    now = [0.0]
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: now[0])
    shown = {}
    monkeypatch.setattr(
        scoring,
        "progress_bar",
        lambda: SimpleNamespace(
            start=lambda: None,
            add_task=lambda *a, **k: 0,
            update=lambda task, **values: shown.update(values),
            stop=lambda: None,
        ),
    )
    monkeypatch.setattr(scoring.sys, "stdout", SimpleNamespace(isatty=lambda: True))
    plan = scoring.WorkPlan(np.full(5, 10), unit_examples=3, micro_batch_tokens=100)
    progress = scoring._Progress(Ranks(0, num_ranks, 0, torch.device("cpu")), plan, [0, 1], "test")
    now[0] = 0.5
    progress.advance(0)
    assert shown == {
        "completed": expected,
        "info": f"{2 * expected} examples/s {20 * expected} tok/s",
    }
