"""Packed micro-batches: the same tokens, rows and pairs as padded ones, without padding; and how a
step is cut into them."""

import numpy as np
import pytest
import torch

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.cut import cut_step, spread
from sftmix.batches.documents import Documents
from sftmix.pairing.matching import StepUnits


def example(number, length, responses):
    mask = np.zeros(length, dtype=bool)
    mask[length - responses :] = True
    return np.arange(length, dtype=np.int32) + 100 * number, mask


EXAMPLES = [example(1, 6, 3), example(2, 4, 2), example(3, 9, 1)]
PARTNERS = [(0, 1, 0.25)]


def batch(**options):
    return build_micro_batch(EXAMPLES, PARTNERS, indices=(7, 8, 9), pad_id=0, **options)


def test_documents_know_their_bounds_and_positions():
    documents = Documents.of((3, 1, 2))
    assert documents.bounds.tolist() == [0, 3, 4, 6] and documents.bounds.dtype == torch.int32
    assert documents.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize("mixes_inputs", [False, True])
def test_a_packed_micro_batch_has_the_tokens_labels_and_pairs_of_a_padded_one(mixes_inputs):
    padded, packed = batch(mixes_inputs=mixes_inputs), batch(mixes_inputs=mixes_inputs, packs=True)
    assert packed.input_ids.tolist() == [[int(i) for ids, _ in EXAMPLES for i in ids]]
    assert packed.attention_mask.tolist() == [[1] * 19] and packed.documents.lengths == (6, 4, 9)
    for name in ("labels", "owner", "pairs", "lam"):
        assert torch.equal(getattr(packed, name), getattr(padded, name)), name
    assert packed.num_real_tokens == padded.num_real_tokens == 19
    # a row's token, and the one after it, which is its label
    read = [each.input_ids.reshape(-1)[each.rows] for each in (packed, padded)]
    assert torch.equal(*read)
    assert torch.equal(packed.input_ids[0, packed.rows + 1], packed.labels)
    assert packed.indices == (7, 8, 9)
    if mixes_inputs:
        ours, theirs = packed.mixed_inputs, padded.mixed_inputs
        sources = [
            each.input_ids.reshape(-1)[each.mixed_inputs.sources] for each in (packed, padded)
        ]
        assert torch.equal(*sources) and torch.equal(ours.labels, theirs.labels)
        assert ours.documents.lengths == tuple(theirs.attention_mask.sum(1).tolist())
        assert ours.places.tolist() == list(range(sum(ours.documents.lengths)))


def test_a_micro_batch_without_examples_is_one_token_without_loss():
    empty = build_micro_batch([], [], indices=(), pad_id=3, packs=True)
    assert empty.input_ids.tolist() == [[3]] and empty.documents.lengths == (1,)
    assert not len(empty.rows) and empty.num_real_tokens == 0


def step(count, seed=0):
    rng = np.random.default_rng(seed)
    units = rng.permutation(count)
    pairs = np.stack([units[: count // 3], units[count // 3 : 2 * (count // 3)]], axis=1)
    singles = units[2 * (count // 3) :]
    alone = np.stack([singles, np.full_like(singles, -1)], axis=1)
    members = np.concatenate([pairs, alone])
    return StepUnits(members, np.ones(len(members))), rng.integers(1, 300, count)


def tokens_of(plan, piece, num_tokens):
    members = plan.units[piece]
    return int(num_tokens[members[members >= 0]].sum())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("budget", [1, 700, 3000, 10**6])
@pytest.mark.parametrize("square_share", [0.0, 1e-3])
def test_every_unit_is_in_one_packed_micro_batch_and_all_ranks_have_as_many(
    num_ranks, budget, square_share
):
    plan, num_tokens = step(48)
    units = np.arange(len(plan.units))
    ranks = cut_step(
        plan,
        units,
        num_tokens,
        micro_batch_tokens=budget,
        num_ranks=num_ranks,
        packs=True,
        square_share=square_share,
    )
    assert len(ranks) == num_ranks and len({len(pieces) for pieces in ranks}) == 1
    found = [u for pieces in ranks for piece in pieces for u in piece.tolist()]
    assert sorted(found) == units.tolist()
    pieces = [piece for rank in ranks for piece in rank]
    assert all(tokens_of(plan, piece, num_tokens) <= budget for piece in pieces if len(piece) > 1)
    # no more than the fullest rank can use, and no fewer than it needs
    sizes = [[tokens_of(plan, piece, num_tokens) for piece in rank] for rank in ranks]
    most = max(sum(len(piece) for piece in rank) for rank in ranks)
    fewest = max(
        min(-(-sum(size) // budget), len(np.concatenate(rank)))
        for size, rank in zip(sizes, ranks, strict=True)
    )
    assert fewest <= len(ranks[0]) <= min(max(1, most), 2 * fewest)


@pytest.mark.parametrize("square_share", [0.0, 1e-2])
def test_ranks_get_nearly_equal_cost(square_share):
    plan, num_tokens = step(300)
    ranks = cut_step(
        plan,
        np.arange(len(plan.units)),
        num_tokens,
        micro_batch_tokens=2000,
        num_ranks=8,
        packs=True,
        square_share=square_share,
    )

    def cost(rank):
        members = plan.units[np.concatenate(rank)]
        lengths = num_tokens[members[members >= 0]]
        return float((lengths + square_share * lengths**2).sum())

    costs = [cost(rank) for rank in ranks]
    assert max(costs) <= 1.05 * np.mean(costs)


def test_spread_gives_the_dearest_to_the_emptiest():
    cost = np.array([1.0, 5.0, 4.0, 3.0, 3.0])
    bins = spread(cost, np.arange(5), 2)
    assert [each.tolist() for each in bins] == [[1, 4], [2, 3, 0]]
