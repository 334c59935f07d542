"""The baselines: each loss against its formula in float64 and against TextBrewer's."""

import pytest
import torch
from baselines_samples import LABELS, MASK, NEXT_TOKENS, SMALL, close, features, pair, tensors
from textbrewer import losses as textbrewer
from torch import nn
from torch.nn import functional as F

from fastkd.methods.baselines import BASELINES, JSD, KD, PKD, DistilBERT, MiniLLM, MiniLM, MiniLMv2, ReverseKL, TinyBERT
from fastkd.methods.objective import IGNORED


def kl(teacher, student):
    """KL of the softmax of float64 logits (..., V), per row."""
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def check(objective, student, teacher, labels, terms):
    """``terms``: name → (weight, float64 value) of all parts with a weight."""
    total, parts = objective(student, teacher, labels, MASK)
    assert list(parts) == list(terms)
    for name, (_, value) in terms.items():
        close(parts[name], value)
    close(total, sum(weight * value for weight, value in terms.values()))
    total.backward()
    assert all(tensor.grad is None for tensor in tensors(teacher))


def test_kd_of_classes():
    student, teacher = pair()
    terms = {
        "label": (0.3, F.cross_entropy(student.logits.double(), LABELS)),
        "kd": (0.7, 9 * kl(teacher.logits / 3, student.logits / 3).mean()),
    }
    check(KD(alpha=0.7, temperature=3.0), student, teacher, LABELS, terms)
    _, parts = KD(temperature=3.0)(student, teacher, LABELS, MASK)
    soft = [textbrewer.kd_ce_loss(of.logits, teacher.logits, 3.0) for of in (student, teacher)]
    close(parts["kd"], 9 * (soft[0] - soft[1]))  # the cross-entropy of soft labels has their entropy on top, and no T²


def test_kd_of_a_regression_is_the_squared_error():
    student, teacher = pair(logits=(3, 1))
    scores = torch.tensor([0.5, float("nan"), 2.0])  # a missing score
    error = (student.logits.double().squeeze(-1) - scores)[[0, 2]].square().sum() / 3
    terms = {"label": (0.5, error), "kd": (0.5, textbrewer.kd_mse_loss(student.logits, teacher.logits).double())}
    check(KD(), student, teacher, scores, terms)


def words():
    student, teacher = pair(logits=(3, 5, 7))
    kept = NEXT_TOKENS != IGNORED
    label = F.cross_entropy(student.logits[kept].double(), NEXT_TOKENS[kept])
    return student, teacher, label, student.logits[kept], teacher.logits[kept]


def test_kd_of_words_is_minillms_but_for_a_constant():
    student, teacher, label, mine, theirs = words()
    soft = -(theirs.double().softmax(-1) * mine.double().log_softmax(-1)).sum(-1).mean()
    entropy = -(theirs.double().softmax(-1) * theirs.double().log_softmax(-1)).sum(-1).mean()
    check(KD(temperature=1.0), student, teacher, NEXT_TOKENS, {"label": (0.5, label), "kd": (0.5, soft - entropy)})


def test_reverse_kl_of_words():
    student, teacher, label, mine, theirs = words()
    terms = {"label": (0.25, label), "reverse_kl": (0.75, 4 * kl(mine / 2, theirs / 2).mean())}
    check(ReverseKL(alpha=0.75, temperature=2.0), student, teacher, NEXT_TOKENS, terms)


def test_jsd_of_words():
    student, teacher, _, mine, theirs = words()
    p, q, beta = theirs.double().softmax(-1), mine.double().softmax(-1), 0.2
    m = beta * p + (1 - beta) * q
    rows = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    check(JSD(beta=beta), student, teacher, NEXT_TOKENS, {"jsd": (1.0, rows.mean())})


def test_minillm_of_words():
    student, teacher, label, mine, theirs = words()
    q = mine.double().softmax(-1)
    single = -(q * theirs.double().log_softmax(-1)).sum(-1) + (q * q.log()).sum(-1)  # CE(q, p) − H(q)
    terms = {"single_step": (1.0, single.mean()), "label": (1.4, label), "kd": (0.6, kl(theirs, mine).mean())}
    check(MiniLLM(lm_coef=2.0, kd_ratio=0.3), student, teacher, NEXT_TOKENS, terms)


def test_pkd():
    student, teacher = features(0, layers=3, grad=True), features(1, layers=6)
    norm = lambda x: x[:, 0].double() / x[:, 0].double().norm(dim=-1, keepdim=True)  # noqa: E731
    errors = [(norm(student.hidden[s]) - norm(teacher.hidden[t])).square().mean() for s, t in ((1, 2), (2, 4))]
    pointwise = F.kl_div((student.logits / 10).log_softmax(-1), (teacher.logits / 10).softmax(-1), reduction="none")
    terms = {
        "label": (0.3, F.cross_entropy(student.logits.double(), LABELS)),
        "kd": (0.7, 100 * pointwise.double().mean()),
        "patience": (500.0, sum(errors) / 2),
    }
    check(PKD(), student, teacher, LABELS, terms)
    _, parts = PKD(layers=[(2, 5)])(student, teacher, LABELS, None)
    close(parts["patience"] * 8, textbrewer.pkd_loss(student.hidden[2], teacher.hidden[5]))  # summed over 8 features


@pytest.mark.parametrize("objective", [PKD(alpha=1.0, beta=0.0), TinyBERT(stage="prediction")])
def test_padding_does_not_change_the_loss_of_spans(objective):
    """Of spans and tokens the mean is over rows alone: their candidates are no classes."""
    student, teacher = pair(logits=(3, 2, 5))
    ends = torch.tensor([[0, 4], [1, 2], [0, 1]])
    total, _ = objective(student, teacher, ends, None)
    t = objective.temperature
    entropy = -(teacher.logits.double().softmax(-1) * teacher.logits.double().log_softmax(-1)).sum(-1).mean()
    divergence = t * t * kl(teacher.logits / t, student.logits / t).mean()
    close(total, divergence + entropy if isinstance(objective, TinyBERT) else divergence)
    for of in (student, teacher):
        of.logits = F.pad(of.logits, (0, 7), value=-torch.inf)
    close(objective(student, teacher, ends, None)[0], total)


def test_distilbert():
    student, teacher = pair()
    cosine = F.cosine_similarity(student.hidden[-1].double(), teacher.hidden[-1].double(), dim=-1)
    terms = {
        "kd": (5.0, 4 * kl(teacher.logits / 2, student.logits / 2).mean()),
        "label": (2.0, F.cross_entropy(student.logits.double(), LABELS)),
        "cosine": (1.0, (1 - cosine)[MASK.bool()].mean()),
    }
    check(DistilBERT(), student, teacher, LABELS, terms)
    for mask in (MASK, None):
        _, parts = DistilBERT()(student, teacher, LABELS, mask)
        close(parts["cosine"], textbrewer.cos_loss(student.hidden[-1], teacher.hidden[-1], mask))


def test_a_cosine_of_no_tokens_is_zero():
    student, teacher = pair()
    for mask, tokens in ((MASK * 0, None), (MASK * 0, torch.tensor(0.0)), (MASK, 0)):
        _, parts = DistilBERT()(student, teacher, LABELS, mask, tokens=tokens)
        assert parts["cosine"] == 0


def scores_of(attention):
    return attention.query.double() @ attention.key.double().mT * attention.scale


@pytest.mark.parametrize("causal", [False, True])
def test_tinybert_intermediate(causal):
    student, teacher = pair(causal=causal)
    seen = MASK.bool()[:, None, None, :] & (torch.ones(5, 5).tril() > 0 if causal else torch.tensor(True))
    attention = hidden = 0.0
    for s, t in ((1, 2), (2, 4)):
        mine, theirs = scores_of(student.attention[s - 1]), scores_of(teacher.attention[t - 1])
        attention += (mine.where(seen, 0) - theirs.where(seen, 0)).square().mean()
    for s, t in ((0, 0), (1, 2), (2, 4)):
        hidden += (student.hidden[s].double() - teacher.hidden[t].double()).square().mean()
    check(TinyBERT(), student, teacher, LABELS, {"attention": (1.0, attention), "hidden": (1.0, hidden)})


def test_tinybert_is_textbrewers_where_nothing_is_padded():
    student, teacher = pair()
    _, parts = TinyBERT(layers=[(2, 3)])(student, teacher, LABELS, None)
    mine, theirs = (scores_of(x) for x in (student.attention[1], teacher.attention[2]))
    close(parts["attention"], textbrewer.att_mse_loss(mine, theirs, torch.ones_like(MASK)))
    states = ((student.hidden[0], teacher.hidden[0]), (student.hidden[2], teacher.hidden[3]))
    close(parts["hidden"], sum(textbrewer.hid_mse_loss(s, t) for s, t in states))


def test_tinybert_projects_a_narrower_student_with_one_map():
    student, teacher = features(0, width=4, grad=True), features(1, layers=4)
    projection = nn.Linear(4, 8)
    _, parts = TinyBERT(projection=projection)(student, teacher, LABELS, MASK)
    projected = [F.linear(x, projection.weight, projection.bias).double() for x in student.hidden]
    pairs = zip(projected, (teacher.hidden[i].double() for i in (0, 2, 4)), strict=True)
    close(parts["hidden"], sum((s - t).square().mean() for s, t in pairs))
    parts["hidden"].backward()
    assert projection.weight.grad.abs().min() > 0


def test_tinybert_prediction():
    student, teacher = pair()
    soft = -((teacher.logits / 2).double().softmax(-1) * (student.logits / 2).double().log_softmax(-1)).mean()
    check(TinyBERT("prediction", temperature=2.0), student, teacher, LABELS, {"kd": (1.0, soft)})
    close(soft * 3, textbrewer.kd_ce_loss(student.logits, teacher.logits, 2.0))  # summed over 3 classes
    student, teacher = pair(logits=(3, 1))
    scores = torch.tensor([0.5, 1.0, 2.0])
    error = (student.logits.squeeze(-1).double() - scores).square().mean()
    check(TinyBERT("prediction"), student, teacher, scores, {"label": (1.0, error)})


def relation_kl(mine, theirs, scales, causal=False):
    """KL of softmax(X Yᵀ · scale) of float64 pairs (X, Y) of (B, H, T, d), a mean over heads and real queries."""
    seen = MASK.bool()[:, None, None, :] & (torch.ones(5, 5).tril() > 0 if causal else torch.tensor(True))
    both = [
        (x.double() @ y.double().mT * scale).masked_fill(~seen, -1e4)
        for (x, y), scale in zip((mine, theirs), scales, strict=True)
    ]
    return kl(both[1], both[0]).transpose(1, 2)[MASK.bool()].mean(), both


@pytest.mark.parametrize("causal", [False, True])
def test_minilm(causal):
    student, teacher = pair(causal=causal)
    mine, theirs = student.attention[-1]._replace(scale=0.3), teacher.attention[-1]._replace(scale=0.7)
    student.attention[-1], teacher.attention[-1] = mine, theirs
    maps, scores = relation_kl((mine.query, mine.key), (theirs.query, theirs.key), (0.3, 0.7), causal)
    value, _ = relation_kl((mine.value, mine.value), (theirs.value, theirs.value), (0.5, 0.5), causal)
    label = F.cross_entropy(student.logits.double(), LABELS)
    terms = {"attention": (1.0, maps), "value": (1.0, value), "label": (0.5, label)}
    check(MiniLM(label_weight=0.5), student, teacher, LABELS, terms)
    soft = [textbrewer.att_ce_loss(x, scores[1], MASK) for x in scores]
    close(maps, soft[0] - soft[1])


def test_minilm_takes_a_student_whose_bias_is_learned():
    student, teacher = pair()
    bias = torch.randn(1, 1, *student.attention[-1].query.shape[2:3] * 2, requires_grad=True)
    student.attention[-1] = student.attention[-1]._replace(bias=bias)
    total, _ = MiniLM()(student, teacher, LABELS, MASK)
    total.backward()
    assert student.attention[-1].query.grad.any()


def test_minilm_is_a_mean_over_however_many_value_heads():
    models = pair()
    for model in models:
        model.attention[-1] = model.attention[-1]._replace(value=model.attention[-1].value[:, :1])
    _, alone = MiniLM()(*models, LABELS, MASK)
    _, counted = MiniLM()(*models, LABELS, MASK, tokens=int(MASK.sum()))
    close(counted["value"], alone["value"].double())


def test_minilmv2_compares_any_widths_and_heads_in_any_layer():
    student, teacher = features(0, width=8, heads=4, grad=True), features(1, layers=4, width=16, heads=2)
    terms = {}
    for name in ("query", "key", "value"):
        split = [  # heads are joined, then split anew into 8
            getattr(given.attention[index], name).transpose(1, 2).flatten(2).unflatten(2, (8, -1)).transpose(1, 2)
            for given, index in ((student, 1), (teacher, 2))
        ]
        scales = [x.shape[-1] ** -0.5 for x in split]
        terms[name] = (1.0, relation_kl((split[0], split[0]), (split[1], split[1]), scales)[0])
    check(MiniLMv2(relation_heads=8, teacher_layer=3), student, teacher, LABELS, terms)


NO_PADS_READ = ("kd", "pkd", "distilbert", "minilm", "minilmv2", "reverse-kl", "jsd", "minillm")


@pytest.mark.parametrize("name", NO_PADS_READ)
def test_a_nan_in_a_pad_goes_nowhere(name):
    objective = BASELINES[name](**SMALL.get(name, {}))
    totals = []
    for filling in (0.0, float("nan")):
        student, teacher = pair()
        with torch.no_grad():
            for given in (student, teacher):
                for state in given.hidden:
                    state[MASK == 0] = filling
                for tensor in tensors(given)[len(given.hidden) : -1]:
                    tensor.transpose(1, 2)[MASK == 0] = filling
        total, _ = objective(student, teacher, LABELS, MASK)
        total.backward()
        assert all(x.grad.isfinite().all() for x in tensors(student) if x.grad is not None)
        totals.append(total)
    close(totals[1], totals[0])


def test_no_gradient_flows_to_the_teacher_of_a_cosine():
    student, teacher = features(0, grad=True), features(1, grad=True)
    total, _ = DistilBERT(alpha_ce=0.0, alpha_task=0.0)(student, teacher, LABELS, MASK)
    total.backward()
    assert student.hidden[-1].grad is not None
    assert teacher.hidden[-1].grad is None
