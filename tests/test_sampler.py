"""The batch sampler: what it covers, what fixes its order, and how Trainer and Accelerate use it."""

from collections import Counter

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from fastkd.training.sampler import MultiTaskBatchSampler

SIZES = {"small": 7, "large": 50, "single": 1}
TASK_OF = np.repeat(list(SIZES), list(SIZES.values()))


def tasks_of(batches):
    """Task of each batch; fails when a batch mixes tasks."""
    found = [set(TASK_OF[batch]) for batch in batches]
    assert all(len(names) == 1 for names in found)
    return [names.pop() for names in found]


@pytest.mark.parametrize("lengths", [None, np.arange(58)[::-1]])
def test_every_row_once_in_single_task_batches(lengths):
    sampler = MultiTaskBatchSampler(SIZES, 4, lengths=lengths)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 2 + 13 + 1
    assert sorted(row for batch in batches for row in batch) == list(range(58))
    assert Counter(tasks_of(batches)) == {"small": 2, "large": 13, "single": 1}
    assert Counter(map(len, batches)) == {4: 13, 3: 1, 2: 1, 1: 1}


def test_batches_of_tasks_are_interleaved():
    firsts = []
    for epoch in range(20):
        sampler = MultiTaskBatchSampler({"a": 40, "b": 40}, 4)
        sampler.set_epoch(epoch)
        firsts += ["b" if batch[0] >= 40 else "a" for batch in list(sampler)[:10]]
    assert 60 < firsts.count("a") < 140


@pytest.mark.parametrize("tau", [None, 0.5])
def test_order_depends_on_seed_and_epoch_alone(tau):
    def order(seed, epoch):
        sampler = MultiTaskBatchSampler(SIZES, 4, seed=seed, tau=tau)
        list(sampler)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_lengths_of_a_batch_are_similar():
    lengths = np.random.default_rng(0).integers(3, 128, size=3000)

    def padding(sampler):
        return sum(len(batch) * lengths[batch].max() for batch in sampler) / lengths.sum() - 1

    shuffled = MultiTaskBatchSampler({"a": 1000, "b": 2000}, 16)
    grouped = MultiTaskBatchSampler({"a": 1000, "b": 2000}, 16, lengths=lengths)
    assert padding(shuffled) > 0.7
    assert padding(grouped) < 0.06
    first = [batch[0] for batch in grouped]
    grouped.set_epoch(1)
    assert first != [batch[0] for batch in grouped]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_weighted_tasks_follow_size_to_the_tau(tau):
    sampler = MultiTaskBatchSampler(SIZES, 4, tau=tau, batches_per_epoch=3000)
    assert len(sampler) == 3000
    counts = Counter(tasks_of(sampler))
    weights = {task: size**tau for task, size in SIZES.items()}
    for task, weight in weights.items():
        assert counts[task] / 3000 == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_weighted_task_repeats_only_after_all_its_rows():
    sampler = MultiTaskBatchSampler(SIZES, 4, tau=0.0, batches_per_epoch=60)
    small = [row for batch in sampler if TASK_OF[batch[0]] == "small" for row in batch]
    assert len(small) > 14
    for start in range(0, len(small) - 6, 7):
        assert sorted(small[start : start + 7]) == list(range(7))


def test_weighted_batches_do_not_come_by_length():
    sampler = MultiTaskBatchSampler({"a": 100}, 4, lengths=np.arange(100), tau=1.0)
    longest = [max(batch) for batch in sampler]
    assert len(longest) == len(set(longest)) == 25
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_weighted_epoch_is_as_long_as_once_through():
    assert len(list(MultiTaskBatchSampler(SIZES, 4, tau=1.0))) == len(MultiTaskBatchSampler(SIZES, 4))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_whole_batches(processes):
    sampler = MultiTaskBatchSampler(SIZES, 4)
    whole = list(sampler)
    shards = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert {len(shard) for shard in shards} == {-(-len(whole) // processes)}
    dealt = [shard[step] for step in range(len(shards[0])) for shard in shards]
    assert dealt[: len(whole)] == whole
    assert dealt[len(whole) :] == whole[: len(dealt) - len(whole)]


def test_skipping_resumes_exactly():
    sampler = MultiTaskBatchSampler(SIZES, 4, seed=5)
    sampler.set_epoch(2)
    whole = list(sampler)
    loader = DataLoader(range(58), batch_sampler=sampler, collate_fn=list)
    assert list(skip_first_batches(loader, 6)) == whole[6:]


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {}, "sizes has no rows for any task"),
        ({"a": 3, "b": 0}, {}, "sizes has no rows for b"),
        ({"a": 3}, {"batch_size": 0}, "batch_size is 0"),
        ({"a": 3}, {"tau": -1.0}, "tau is -1.0"),
        ({"a": 3}, {"tau": float("nan")}, "tau is nan"),
        ({"a": 3}, {"lengths": [1, 2]}, "lengths has 2 entries; it must have one per row, 3"),
        ({"a": 3}, {"batches_per_epoch": 5}, "needs tau"),
    ],
)
def test_bad_input(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        MultiTaskBatchSampler(sizes, **({"batch_size": 2} | options))
