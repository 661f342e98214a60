import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.contracts import UserError
from distmoe.data.index_plan import IndexPlan, PlannedBatch, split_validation

IDS = torch.arange(100, 111)  # 11 samples, so that 100 is sample 0 of the plan


def as_rows(planned: list[PlannedBatch]) -> list[tuple[int, int, list[int], int, int]]:
    return [
        (batch.step, batch.micro, batch.sample_ids.tolist(), batch.num_valid, batch.step_samples) for batch in planned
    ]


def valid_ids(planned: list[PlannedBatch]) -> list[int]:
    return [i for batch in planned for i in batch.sample_ids[: batch.num_valid].tolist()]


def in_order(**settings: int | bool) -> IndexPlan:
    return IndexPlan(IDS, **{"batch_size": 4, "shuffle": False, "drop_last": False} | settings)  # type: ignore[arg-type]


def test_one_rank_gets_whole_batches_and_the_last_is_padded_with_its_first_sample():
    assert as_rows(in_order().epoch(0)) == [
        (0, 0, [100, 101, 102, 103], 4, 4),
        (1, 0, [104, 105, 106, 107], 4, 4),
        (2, 0, [108, 109, 110, 108], 3, 3),
    ]


def test_drop_last_leaves_out_the_partial_batch():
    plan = in_order(drop_last=True)
    assert plan.num_steps == 2
    assert valid_ids(plan.epoch(0)) == list(range(100, 108))


def test_ranks_and_micro_batches_take_contiguous_slices():
    # A batch of 4 is micro-batches 100 101 | 102 103; each of two ranks takes one sample of each. The last batch of 3
    # is spread as 108 | 109 110, so rank 1 has nothing in its first micro-batch.
    assert as_rows(in_order(accumulation=2, world_size=2, rank=0).epoch(0)) == [
        (0, 0, [100], 1, 4),
        (0, 1, [102], 1, 4),
        (1, 0, [104], 1, 4),
        (1, 1, [106], 1, 4),
        (2, 0, [108], 1, 3),
        (2, 1, [109], 1, 3),
    ]
    assert as_rows(in_order(accumulation=2, world_size=2, rank=1).epoch(0))[4:] == [
        (2, 0, [108], 0, 3),
        (2, 1, [110], 1, 3),
    ]


def test_uneven_slices_have_one_length_and_the_last_rank_gets_less():
    # 4 samples over 3 ranks: slices of ceil(4 / 3) = 2, so 2 + 2 + 0; the partial batch of 3: 2 + 1 + 0.
    ranks = [as_rows(in_order(world_size=3, rank=rank).epoch(0)) for rank in range(3)]
    assert ranks[0][0] == (0, 0, [100, 101], 2, 4)
    assert ranks[1][0] == (0, 0, [102, 103], 2, 4)
    assert ranks[2][0] == (0, 0, [100, 100], 0, 4)
    assert [rank[2] for rank in ranks] == [
        (2, 0, [108, 109], 2, 3),
        (2, 0, [110, 108], 1, 3),
        (2, 0, [108, 108], 0, 3),
    ]


def test_set_smaller_than_a_batch_is_one_batch_without_needless_padding():
    plan = IndexPlan(torch.tensor([7, 8, 9]), batch_size=500, world_size=2, rank=1, shuffle=False, drop_last=False)
    assert as_rows(plan.epoch(0)) == [(0, 0, [9, 7], 1, 3)]


def test_no_samples_is_no_batches():
    plan = IndexPlan(torch.zeros(0, dtype=torch.int64), batch_size=4, drop_last=False)
    assert plan.num_steps == 0
    assert plan.epoch(0) == []


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 24),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    accumulation=st.integers(1, 5),
    drop_last=st.booleans(),
    seed=st.integers(0, 5),
)
def test_ranks_and_micro_batches_of_a_step_make_up_its_global_batch(
    num_samples: int, batch_size: int, world_size: int, accumulation: int, drop_last: bool, seed: int
):
    ids = torch.arange(num_samples) * 3
    alone = IndexPlan(ids, min(batch_size, num_samples), seed=seed, drop_last=drop_last)
    ranks = [
        dataclasses.replace(alone, accumulation=accumulation, world_size=world_size, rank=rank).epoch(2)
        for rank in range(world_size)
    ]
    steps = alone.epoch(2)
    assert {len(planned) for planned in ranks} == {len(steps) * accumulation}
    assert len({len(batch.sample_ids) for planned in ranks for batch in planned}) <= 1
    for whole in steps:
        # Micro-batch by micro-batch and rank by rank, the slices are the global batch in its own order.
        shares = [planned[whole.step * accumulation + micro] for micro in range(accumulation) for planned in ranks]
        assert {(share.step, share.step_samples) for share in shares} == {(whole.step, whole.num_valid)}
        for micro in range(accumulation):
            of_micro = [share for share in shares if share.micro == micro]
            assert {share.micro_samples for share in of_micro} == {sum(share.num_valid for share in of_micro)}
        assert sum(share.num_valid for share in shares) == whole.num_valid
        assert valid_ids(shares) == whole.sample_ids[: whole.num_valid].tolist()
        assert {i for share in shares for i in share.sample_ids.tolist()} <= set(whole.sample_ids.tolist())


def test_epoch_is_a_permutation_that_changes_with_epoch_and_seed_only():
    plan = IndexPlan(IDS, batch_size=11, seed=3)
    first, again, second = (valid_ids(plan.epoch(epoch)) for epoch in (0, 0, 1))
    other_seed = valid_ids(dataclasses.replace(plan, seed=4).epoch(0))
    assert sorted(first) == sorted(second) == sorted(other_seed) == IDS.tolist()
    assert first == again
    assert len({tuple(ids) for ids in (first, second, other_seed, IDS.tolist())}) == 4
    assert valid_ids(dataclasses.replace(plan, batch_size=4, drop_last=False).epoch(0)) == first


def test_resume_gets_the_tail_of_the_epoch():
    plan = IndexPlan(IDS, batch_size=3, accumulation=2, world_size=2, rank=1, drop_last=False)
    whole = as_rows(plan.epoch(5))
    for first_step in range(plan.num_steps + 1):
        assert as_rows(plan.epoch(5, first_step)) == whole[first_step * 2 :]
    with pytest.raises(ValueError, match=r"first_step 5 is outside 0\.\.4"):
        plan.epoch(5, 5)


def test_drop_last_without_a_whole_batch_names_the_setting_and_the_fix():
    with pytest.raises(UserError, match=r"data\.batch_size is 12.* 11 samples.*drop_last=false"):
        in_order(batch_size=12, drop_last=True)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"accumulation": 0}, {"world_size": 2, "rank": 2}, {"rank": -1}])
def test_impossible_layout_is_refused(wrong: dict[str, int]):
    with pytest.raises(ValueError, match="must be at least 1"):
        in_order(**wrong)


def test_sample_ids_of_another_type_are_refused():
    with pytest.raises(ValueError, match="int64"):
        IndexPlan(torch.zeros(4), batch_size=2)


def test_validation_split_is_complete_disjoint_ascending_and_always_the_same():
    train, validation = split_validation(50, 10)
    assert len(validation) == 10
    assert sorted(train.tolist() + validation.tolist()) == list(range(50))
    assert train.tolist() == sorted(train.tolist())
    # Written down once: a change of these ids would let earlier runs' training samples into the validation set.
    assert validation.tolist() == [4, 6, 10, 21, 26, 30, 33, 36, 41, 44]


def test_validation_split_may_be_empty_but_not_everything():
    train, validation = split_validation(5, 0)
    assert train.tolist() == [0, 1, 2, 3, 4]
    assert len(validation) == 0
    with pytest.raises(UserError, match=r"data\.validation_size is 5.*5 samples.*0 to 4"):
        split_validation(5, 5)
