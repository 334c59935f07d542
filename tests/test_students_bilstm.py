"""The BiLSTM student against its formulas, and what must not change its answers."""

import pytest
import torch
from tiny import same_answers
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.students.bilstm import BiLSTM
from fastkd.training.classifiers import task_loss

TASKS = {"nli": {"labels": ["entailment", "neutral", "contradiction"]}, "similarity": {"labels": []}}


def tiny(**overrides):
    torch.manual_seed(0)
    config = BiAttentiveLSTMConfig(
        vocab_size=50,
        embedding_size=6,
        projection_size=5,
        hidden_size_per_direction=3,
        head_size=4,
        initializer_range=1.0,
        tasks=TASKS,
        **overrides,
    )
    return BiAttentiveLSTM(config).double().eval()


def pack(pairs, length, *, left=False):
    """[a..., b...] with types 0/1, padded to ``length`` with a token id that the model must not see."""
    rows = []
    for a, b in pairs:
        pads = [0] * (length - len(a) - len(b))
        row = [(token, 1, 0) for token in a] + [(token, 1, 1) for token in b]
        padding = [(7, 0, 0) for _ in pads]
        rows.append(padding + row if left else row + padding)
    ids, mask, types = torch.tensor(rows).unbind(-1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


PAIRS = [([3, 9, 4, 20], [5, 6]), ([11, 12], [13, 14, 15, 16, 17]), ([30], [31])]
SINGLES = [([3, 9, 4, 20], []), ([11, 12], []), ([30], [])]


def lstm_by_hand(lstm, inputs):
    w_ih, w_hh, b_ih, b_hh = lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0
    hidden = cell = torch.zeros(w_hh.shape[1], dtype=torch.float64)
    outputs = []
    for x in inputs:
        i, f, g, o = (w_ih @ x + b_ih + w_hh @ hidden + b_hh).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return outputs


def bilstm_by_hand(layer, inputs):
    ahead = lstm_by_hand(layer.forwards, inputs)
    back = lstm_by_hand(layer.backwards, inputs[::-1])[::-1]
    return [torch.cat([a, b]) for a, b in zip(ahead, back, strict=True)]


def mix_by_hand(states, others):
    mixed = []
    for state in states:
        weights = torch.stack([state @ other for other in others]).softmax(0)
        context = sum(weight * other for weight, other in zip(weights, others, strict=True))
        mixed.append(torch.cat([state, state - context, state * context]))
    return mixed


def pool_by_hand(pool, states):
    stacked = torch.stack(states)
    weights = (stacked @ pool.scorer.weight[0]).softmax(0)
    parts = {
        "max": stacked.max(0).values,
        "min": stacked.min(0).values,
        "mean": stacked.mean(0),
        "attention": sum(weight * state for weight, state in zip(weights, states, strict=True)),
    }
    return torch.cat([parts[kind] for kind in pool.kinds])


def logits_by_hand(model, a, b, task):
    """The formulas of the module's docstring for one row, token by token, without batch, padding or mask."""
    x, y = (
        bilstm_by_hand(
            model.encoder,
            [(model.projection.weight @ model.word_embeddings.weight[t] + model.projection.bias).relu() for t in ids],
        )
        for ids in (a, b or a)
    )
    first, second = model.integrators[0], model.integrators[-1]
    features = torch.cat(
        [
            pool_by_hand(model.pools[0], bilstm_by_hand(first, mix_by_hand(x, y))),
            pool_by_hand(model.pools[-1], bilstm_by_hand(second, mix_by_hand(y, x))),
        ]
    )
    inner, _, _, outer = model.heads[task]
    return outer.weight @ (inner.weight @ features + inner.bias).relu() + outer.bias


@pytest.mark.parametrize("rows", [PAIRS, SINGLES, [PAIRS[0], SINGLES[1], PAIRS[2]]], ids=["pairs", "singles", "mixed"])
@pytest.mark.parametrize("share_integrator", [False, True])
def test_forward_agrees_with_the_formulas(rows, share_integrator):
    model = tiny(share_integrator=share_integrator, pooling=["max", "min", "mean", "attention"])
    for task in TASKS:
        logits = model(**pack(rows, 9), task=task).logits
        expected = torch.stack([logits_by_hand(model, a, b, task) for a, b in rows])
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
        assert logits.std(0).min() > 1e-3  # the rows differ, so agreement means something


@pytest.mark.parametrize("rows", [PAIRS, SINGLES], ids=["pairs", "singles"])
def test_padding_does_not_change_logits(rows):
    model = tiny()
    logits = model(**pack(rows, 7), task="nli").logits
    alone = torch.cat([model(**pack([row], len(row[0] + row[1])), task="nli").logits for row in rows])
    more = model(**pack(rows, 15), task="nli").logits
    left = model(**pack(rows, 15, left=True), task="nli").logits
    for other in (alone, more, left):
        torch.testing.assert_close(other, logits, rtol=1e-12, atol=1e-12)


def test_padding_does_not_change_gradients():
    model = tiny()
    gradients = []
    for length in (7, 15):
        model.zero_grad()
        model(**pack(PAIRS, length), labels=torch.tensor([0, 1, 2]), task="nli").loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_order_of_the_sentences_matters():
    model = tiny()
    swapped = [(b, a) for a, b in PAIRS]
    assert (
        model(**pack(PAIRS, 7), task="nli").logits - model(**pack(swapped, 7), task="nli").logits
    ).abs().max() > 1e-3


def test_layer_equals_torch_bidirectional_lstm_on_packed_sequences():
    torch.manual_seed(0)
    layer, lengths, x = BiLSTM(5, 4), torch.tensor([6, 2, 4]), torch.randn(3, 6, 5)
    torch_layer = torch.nn.LSTM(5, 4, batch_first=True, bidirectional=True)
    state = dict(layer.forwards.named_parameters())
    state |= {f"{name}_reverse": p for name, p in layer.backwards.named_parameters()}
    torch_layer.load_state_dict(state)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(torch_layer(packed)[0], batch_first=True)
    torch.testing.assert_close(layer(x, lengths), expected)


def test_preset_mkd_has_the_parameters_of_the_paper():
    """10,172,162 without embeddings and without the attentive pooling's two scoring vectors."""
    config = BiAttentiveLSTMConfig.preset("mkd", tasks={"sst2": {"labels": ["negative", "positive"]}})
    with torch.device("meta"):
        model = BiAttentiveLSTM(config)
    scorers = sum(pool.scorer.weight.numel() for pool in model.pools)
    counted = sum(p.numel() for p in model.parameters()) - model.word_embeddings.weight.numel()
    assert scorers == 2 * 512
    assert counted - scorers == 10_172_162


def test_auto_classes_load_what_was_saved(tmp_path):
    model = tiny(share_integrator=True, pooling=["mean", "attention"]).float()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, BiAttentiveLSTM)
    assert AutoConfig.from_pretrained(tmp_path).tasks == TASKS
    same_answers(loaded(**pack(PAIRS, 7), task="nli").logits, model(**pack(PAIRS, 7), task="nli").logits)


def test_labels_give_the_loss_of_the_task():
    model, batch = tiny(), pack(PAIRS, 7)
    labels, scores = torch.tensor([2, 0, 1]), torch.tensor([0.5, 3.0, 5.0])
    log_probabilities = model(**batch, task="nli").logits.log_softmax(-1)
    assert model(**batch, task="nli", labels=labels).loss.item() == pytest.approx(
        -log_probabilities[range(3), labels].mean().item(), rel=1e-5
    )
    predicted = model(**batch, task="similarity").logits[:, 0]
    assert model(**batch, task="similarity", labels=scores).loss.item() == pytest.approx(
        (predicted - scores).square().mean().item(), rel=1e-5
    )


def test_rows_without_a_label_add_nothing_to_the_loss():
    model, batch = tiny(), pack(PAIRS, 7)
    for task, missing, labels in (("nli", -1, [2, 0, 1]), ("similarity", torch.nan, [0.5, 3.0, 5.0])):
        logits = model(**batch, task=task).logits
        want = sum(task_loss(logits[row, None], torch.tensor(labels[row : row + 1])) for row in (0, 2)) / 3
        labels[1] = missing
        torch.testing.assert_close(model(**batch, task=task, labels=torch.tensor(labels)).loss, want)


def test_bad_input_is_refused():
    model, batch = tiny(), pack(PAIRS, 7)
    with pytest.raises(ValueError, match=r"task must be one of .*nli.*similarity.*got None"):
        model(**batch)
    with pytest.raises(ValueError, match="got 'cola'"):
        model(**batch, task="cola")
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="row 1 has none"):
        model(**batch, task="nli")
    with pytest.raises(ValueError, match="pooling must name some of"):
        BiAttentiveLSTMConfig(pooling=["median"])
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        BiAttentiveLSTMConfig.preset("huge")
