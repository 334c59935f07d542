"""The baselines on models: what they read there, and that nothing of a model differs from itself."""

import pytest
import torch
from baselines_samples import LABELS, MASK, SMALL, close
from tiny import bert_config
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fastkd.methods.baselines import BASELINES, KD, PKD, DistilBERT, InTurn, MiniLM, MiniLMv2, TinyBERT
from fastkd.methods.baselines.tinybert import attention_scores
from fastkd.methods.makd import MaKDObjective
from fastkd.training.taps import Attention, Features, Taps


def bert(layers, **options):
    config = bert_config(initializer_range=1.0, **options)
    config.num_hidden_layers = layers
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("name", BASELINES)
def test_a_model_differs_in_nothing_from_itself(name):
    """On the features that taps record of real models, where each reads no more than it says."""
    torch.manual_seed(0)
    if name in ("reverse-kl", "jsd", "minillm"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2)).eval()
        labels = torch.randint(16, (3, 5))
    else:
        model = bert(layers=2)
        labels = torch.tensor([0, 1, 1])
    objective = BASELINES[name](**SMALL.get(name, {}) | ({"layers": [(1, 1)]} if name == "pkd" else {}))
    taps = Taps(model, attention=objective.needs_attention, hidden=objective.needs_hidden)
    with taps.record() as recorded:
        recorded.logits = model(input_ids=torch.randint(16, (3, 5)), attention_mask=MASK).logits
    teacher = Features(
        [x.detach() for x in recorded.hidden],
        [a._replace(query=a.query.detach(), key=a.key.detach(), value=a.value.detach()) for a in recorded.attention],
        logits=recorded.logits.detach(),
    )
    total, parts = objective(recorded, teacher, labels, MASK)
    total.backward()
    label = parts.pop("label", None)
    assert label is None or label > 0
    for part in parts.values():
        assert part.abs() < 1e-5


def test_attention_scores_are_those_of_the_models_maps():
    torch.manual_seed(0)
    model = bert(layers=1, attn_implementation="eager")
    ids = torch.randint(16, (3, 5))
    (maps,) = model(input_ids=ids, attention_mask=MASK, output_attentions=True).attentions
    with Taps(model, hidden=False).record() as recorded:
        model(input_ids=ids, attention_mask=MASK)
    scores = attention_scores(recorded.attention[0], MASK)
    seen = MASK.bool()[:, None, None, :].expand_as(scores)
    torch.testing.assert_close(scores.masked_fill(~seen, -torch.inf).softmax(-1), maps)
    assert (scores[~seen] == 0).all()


def test_attention_scores_of_grouped_queries_with_a_window_and_a_bias():
    query, key = torch.randn(1, 4, 5, 2), torch.randn(1, 2, 5, 2)
    bias = torch.randn(1, 4, 5, 5)
    given = Attention(query, key, key, scale=0.5, bias=bias, causal=False, window=2)
    scores = attention_scores(given, None)
    for head in range(4):
        for i in range(5):
            for j in range(5):
                score = 0.5 * query[0, head, i] @ key[0, head // 2, j] + bias[0, head, i, j]
                close(scores[0, head, i, j], score if abs(i - j) < 2 else 0.0)


def test_a_term_without_weight_is_not_computed():
    bare = Features(logits=torch.randn(3, 3))
    for objective in (PKD(beta=0.0), DistilBERT(alpha_cos=0.0)):
        assert not objective.needs_hidden
        objective(bare, bare, LABELS, MASK)


NEEDS = ("needs_teacher", "needs_logits", "needs_attention", "needs_hidden", "needs_maps", "needs_weights")


@pytest.mark.parametrize("form", ["output", "weight"])
def test_two_in_turn_need_what_either_needs(form):
    matrices = MaKDObjective(matrix_form=form)
    for both in (InTurn(matrices, KD()), InTurn(KD(), matrices)):
        assert [getattr(both, need) for need in NEEDS] == [getattr(matrices, need) for need in NEEDS]
    neither = InTurn(KD(), KD())
    assert [need for need in NEEDS if getattr(neither, need)] == ["needs_teacher", "needs_logits"]


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (MiniLM(), False),
        (MiniLM(label_weight=0.5), True),
        (MiniLMv2(), False),
        (TinyBERT(), False),
        (TinyBERT(stage="prediction"), True),
        (MaKDObjective(logits_weight=0.0), True),
        (MaKDObjective(logits_weight=0.0, labels_weight=0.0), False),
        (MaKDObjective(stages=(0.2, 0.6)).at(0.1), False),
        (InTurn(TinyBERT(), KD()), True),
    ],
)
def test_which_losses_read_the_students_logits(objective, wanted):
    assert objective.needs_logits == wanted


def test_of_two_in_turn_each_knows_how_far_the_training_is():
    staged = MaKDObjective(stages=(0.2, 0.6))
    both = InTurn(staged, staged, switch=0.5)
    assert [both.at(progress) for progress in (0.1, 0.4, 0.55, 0.7)] == [staged.at(p) for p in (0.1, 0.4, 0.55, 0.7)]
    assert InTurn(PKD(), KD()).at(0.5) == KD()
