"""Whole batches: the draw and its state, two-target cross-entropy, masks, targets."""

import json

import mixup_samples as samples
import pytest
import torch
import torch.nn.functional as F

from fastkd.losses import embedding_mixup, mixup, mixup_cross_entropy
from fastkd.mixup import Mix, MixupSampler, mix_batch


def one_hot_loss(logits, labels, permutation, lam):
    """Cross-entropy against the mixed one-hot labels, per example: what mixup_cross_entropy must equal."""
    one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    weight = lam.to(logits.dtype).view(-1, *(1,) * labels.dim())
    mixed = weight * one_hot + (1 - weight) * one_hot[permutation]
    return F.cross_entropy(logits.movedim(-1, 1), mixed.movedim(-1, 1), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8,), (8, 5)], ids=str)
def test_cross_entropy_is_that_against_the_mixed_one_hots(shape, dtype):
    logits, labels = torch.randn(*shape, 7).to(dtype), samples.ids(shape, 7)
    permutation, lam = samples.permutation(8), samples.lam(8)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = one_hot_loss(logits.to(wide), labels, permutation, lam)
    for reduction, want in (("none", rows), ("sum", rows.sum()), ("mean", rows.mean())):
        got = mixup_cross_entropy(logits, labels, permutation, lam, reduction=reduction)
        assert got.dtype == wide
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_cross_entropy_has_the_gradient_of_the_mixed_one_hots():
    labels, permutation, lam = samples.ids((6,), 5), samples.permutation(6), samples.lam(6).double()
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    got, want = (f(logits, labels, permutation, lam).sum() for f in (mixup_cross_entropy, one_hot_loss))
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (got * 6, want)]
    assert torch.allclose(*grads)
    assert torch.autograd.gradcheck(lambda z: mixup_cross_entropy(z, labels, permutation, lam), logits)


def test_an_ignored_label_leaves_the_other_one():
    logits, permutation, lam = torch.randn(3, 4), torch.tensor([1, 2, 0]), torch.tensor([0.25, 0.5, 1.0])
    labels = torch.tensor([2, -1, 3])
    log_probs = logits.log_softmax(-1)
    rows = torch.stack((-0.25 * log_probs[0, 2], -0.5 * log_probs[1, 3], -log_probs[2, 3]))
    for reduction, want in (("none", rows), ("sum", rows.sum()), ("mean", rows.sum() / 1.75)):
        got = mixup_cross_entropy(logits, labels, permutation, lam, ignore_index=-1, reduction=reduction)
        assert torch.allclose(got, want)
    logits = torch.full((3, 4), float("nan")).requires_grad_()
    loss = mixup_cross_entropy(logits, torch.full((3,), -100), permutation, lam)
    loss.backward()
    assert loss.item() == 0.0


def test_a_batch_is_mixed_alike_throughout():
    ids, table, mix = samples.ids((6, 4), 9), torch.randn(9, 5), Mix(samples.permutation(6), samples.lam(6))
    mask, labels, targets = ids > 2, samples.ids((6,), 3), torch.randn(6, 3).softmax(-1)
    mixed = mix_batch(mix, ids=ids, table=table, padding_idx=0, mask=mask, labels=labels, targets=targets)
    assert torch.equal(mixed.embeddings, embedding_mixup(ids, table, *mix, padding_idx=0))
    assert torch.equal(mixed.embeddings, mix_batch(mix, F.embedding(ids, table)).embeddings)
    assert torch.equal(mixed.mask, mask | mask[mix.permutation])
    assert torch.equal(mixed.targets, mixup(targets, *mix))
    assert torch.allclose(mixed.targets.sum(-1), torch.ones(6))
    logits = torch.randn(6, 3)
    assert torch.equal(mixed.cross_entropy(logits), mixup_cross_entropy(logits, labels, *mix))
    assert torch.equal(
        mixed.cross_entropy(logits, reduction="none", ignore_index=0),
        mixup_cross_entropy(logits, labels, *mix, reduction="none", ignore_index=0),
    )
    alone = mix_batch(mix, torch.randn(6, 2))
    assert (alone.mask, alone.labels, alone.targets) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_masks_are_united(dtype):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).to(dtype)
    mixed = mix_batch(Mix(torch.tensor([1, 0, 2]), torch.rand(3)), torch.randn(3, 2), mask=mask)
    assert mixed.mask.dtype == dtype
    assert mixed.mask.tolist() == torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).to(dtype).tolist()


def test_the_padding_row_gets_no_gradient_through_a_batch():
    table = torch.randn(9, 5, requires_grad=True)
    mix_batch(MixupSampler()(6), ids=samples.ids((6, 4), 9), table=table, padding_idx=0).embeddings.sum().backward()
    assert not table.grad[0].any()
    assert table.grad.any()


@pytest.mark.parametrize("per_example", [True, False])
def test_a_sampler_that_loaded_a_state_draws_on(per_example):
    sampler = MixupSampler(0.4, per_example=per_example, seed=3)
    sampler(5)
    state = json.loads(json.dumps(sampler.state_dict()))
    want = [sampler(size) for size in (4, 7)]
    resumed = MixupSampler(0.4, per_example=per_example, seed=99)
    resumed.load_state_dict(state)
    for size, draw in zip((4, 7), want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed(size), draw, strict=True))


def test_a_saved_state_does_not_move_with_the_sampler():
    sampler = MixupSampler(seed=1)
    state = sampler.state_dict()
    first = sampler(8)
    sampler.load_state_dict(state)
    assert torch.equal(sampler(8).lam, first.lam)


def test_draws_are_permutations_with_a_beta_distributed_lambda():
    for alpha in (0.05, 0.4, 2.0):
        draw = MixupSampler(alpha)(20_000)
        assert draw.permutation.sort().values.equal(torch.arange(20_000))
        assert (draw.permutation == torch.arange(20_000)).sum() < 10
        assert draw.lam.dtype == torch.float32
        assert 0.0 <= draw.lam.min() <= draw.lam.max() <= 1.0
        assert abs(draw.lam.mean() - 0.5) < 0.02
        assert draw.lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    shared = MixupSampler(per_example=False)(10).lam
    assert shared.shape == (10,)
    assert shared.unique().numel() == 1
    assert MixupSampler(seed=0)(9).lam.ne(MixupSampler(seed=1)(9).lam).all()
    assert MixupSampler()(0).lam.shape == (0,)
