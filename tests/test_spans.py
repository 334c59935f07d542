"""SpanTrainer: gradients under accumulation and padding, evaluation against a loop of one window each, learning."""

import copy

import pytest
import torch
from squad_samples import learnable, write
from test_trainer import Gradients
from tiny import bert_config, tokenizer
from transformers import (
    BertForQuestionAnswering,
    DebertaV2Config,
    DebertaV2ForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    TrainingArguments,
)

from fastkd.data.batches import span_collator
from fastkd.data.squad import load_squad
from fastkd.data.squad_metrics import best_spans, squad_metrics
from fastkd.data.squad_windows import encode_squad
from fastkd.training.spans import SpanTrainer, span_loss

SIZES = {"max_length": 10, "doc_stride": 2, "max_question_length": 2}


def load(folder, unanswerable):
    write(folder / "dev.json", *learnable(unanswerable))
    questions = load_squad("squad_v2", folder)["validation"]
    return questions, encode_squad(questions, tokenizer(), **SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load(tmp_path_factory.mktemp("squad"), unanswerable=False)


@pytest.fixture(scope="module")
def initial():
    torch.manual_seed(0)
    return BertForQuestionAnswering(bert_config())


def trainer_for(model, folder, train=None, evaluation=None, questions=None, callbacks=None, **arguments):
    defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3, "seed": 3}
    args = TrainingArguments(str(folder), **(defaults | arguments))
    collate = span_collator(tokenizer())
    return SpanTrainer(
        copy.deepcopy(model), args, collate, train, evaluation, eval_questions=questions, callbacks=callbacks
    )


def alone(model, window):
    """A window by itself, unpadded: its logits, and the loss that transformers itself takes."""
    names = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")
    return model(**{name: torch.tensor([window[name]]) for name in names})


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_accumulation_and_padding_leave_the_gradient_alone(initial, data, tmp_path, batch_size, accumulation):
    windows = data[1].select(range(8))
    assert len(set(windows["length"][:])) > 1
    kept = Gradients()
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer_for(initial, tmp_path, windows, callbacks=[kept], max_steps=1, max_grad_norm=0.0, **sizes).train()
    model = copy.deepcopy(initial)
    for window in windows:
        (alone(model, window).loss / len(windows)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(kept.steps) == 1
    torch.testing.assert_close(kept.steps[0], expected, rtol=1e-4, atol=1e-7)


def test_windows_of_more_tokens_than_positions_are_refused(data, tmp_path):
    config = bert_config()
    config.max_position_embeddings = 9
    model = BertForQuestionAnswering(config)
    with pytest.raises(ValueError, match="a row has 10 tokens, and the bert 9 positions: lower max_length to that"):
        trainer_for(model, tmp_path, data[1])
    with pytest.raises(ValueError, match="a row has 10 tokens"):
        trainer_for(model, tmp_path, None, data[1], data[0])


def test_a_model_of_distances_reads_any_number_of_tokens(data, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    config = DebertaV2Config(vocab_size=16, **sizes, max_position_embeddings=9, **relative)
    trainer_for(DebertaV2ForQuestionAnswering(config), tmp_path, data[1], max_steps=1).train()


def test_padding_has_no_share_in_the_loss():
    logits, mask = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]])
    at = torch.tensor([1])
    want = torch.log1p(torch.tensor(-1.0).exp())
    torch.testing.assert_close(span_loss(logits, logits, at, at, mask=mask), want)


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_evaluation_is_that_of_windows_one_by_one(initial, tmp_path, unanswerable, strategy):
    questions, windows = load(tmp_path, unanswerable)
    trainer = trainer_for(
        initial, tmp_path, None, windows, questions, per_device_eval_batch_size=3, train_sampling_strategy=strategy
    )
    found = trainer.evaluate()
    starts, ends = torch.full((2, len(windows), 10), -100.0)
    with torch.no_grad():
        for index, window in enumerate(windows):
            outputs = alone(trainer.model.eval(), window)
            starts[index, : window["length"]] = outputs.start_logits[0]
            ends[index, : window["length"]] = outputs.end_logits[0]
    expected = squad_metrics(best_spans(starts, ends, windows, questions), questions["answers"][:])
    assert ("f1_best" in expected) == unanswerable
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_training_learns_to_answer_and_when_not_to(initial, tmp_path):
    questions, windows = load(tmp_path, unanswerable=True)
    trainer = trainer_for(
        initial, tmp_path, windows, windows, questions, num_train_epochs=60, learning_rate=1e-2,
        per_device_train_batch_size=16, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_exact_match"] < 60
    assert after["eval_exact_match"] > 95
    assert after["eval_loss"] < 0.2 < before["eval_loss"]


def test_a_model_without_token_types(data, tmp_path):
    config = DistilBertConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    questions, windows = data
    found = trainer_for(DistilBertForQuestionAnswering(config), tmp_path, windows, windows, questions).evaluate()
    assert 0 <= found["eval_exact_match"] <= found["eval_f1"] <= 100


def test_windows_without_their_questions_are_refused(initial, data, tmp_path):
    with pytest.raises(ValueError, match="eval_questions is None; it must be the questions"):
        trainer_for(initial, tmp_path, None, data[1])
    with pytest.raises(ValueError, match="eval_questions is None; give SpanTrainer"):
        trainer_for(initial, tmp_path).evaluate(data[1])
