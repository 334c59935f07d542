"""LanguageModelTrainer and sampling: token means under accumulation, exact perplexity, the same draws for any batch."""

import collections
import copy

import pytest
import torch
from datasets import concatenate_datasets
from decoder_samples import byte_tokenizer, decoder, write_lines
from test_trainer import Gradients
from torch.nn import functional
from transformers import TrainingArguments

from fastkd.data.batches import language_model_collator, padding_id
from fastkd.data.instructions import encode_instructions, load_instructions, prompt_of
from fastkd.data.rouge import rouge_l
from fastkd.training.generation import GumbelNoise, generate_responses, rouge_of
from fastkd.training.language_model import LanguageModelTrainer

ROWS = [{"instruction": word, "output": word * count} for word, count in (("a", 9), ("bb", 1), ("c", 2), ("d", 17))]
LENGTHS = {"max_length": 220, "max_prompt_length": 180}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    return load_instructions(write_lines(tmp_path_factory.mktemp("instructions") / "rows.jsonl", *ROWS, *ROWS))


@pytest.fixture(scope="module")
def rows(instructions):
    return encode_instructions(instructions, byte_tokenizer(), **LENGTHS)


def trainer_for(model, folder, train=None, evaluation=None, callbacks=None, **arguments):
    defaults = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3, "seed": 3}
    args = TrainingArguments(str(folder), **(defaults | arguments))
    collate = language_model_collator(byte_tokenizer())
    return LanguageModelTrainer(copy.deepcopy(model), args, collate, train, evaluation, callbacks=callbacks)


def mean_loss(model, rows):
    """The mean over all response tokens of all rows, each row alone and unpadded."""
    sums, count = 0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        prompt = row["labels"].count(-100)
        response = torch.tensor(row["input_ids"][prompt:])
        sums = sums + functional.cross_entropy(logits[prompt - 1 : -1], response, reduction="sum")
        count += len(response)
    return sums / count


def test_rows_of_more_tokens_than_positions_are_refused(rows, tmp_path):
    longest = max(rows["length"][:])
    trainer_for(decoder(positions=longest), tmp_path, rows)
    with pytest.raises(ValueError, match=f"a row has {longest} tokens, and the gpt2 {longest - 1} positions"):
        trainer_for(decoder(positions=longest - 1), tmp_path, rows)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (3, 3)])
def test_accumulation_leaves_the_gradient_alone(rows, tmp_path, batch_size, accumulation):
    model, kept = decoder(), Gradients()
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer = trainer_for(model, tmp_path, rows, callbacks=[kept], max_steps=1, max_grad_norm=0.0, **sizes)
    reported = trainer.train().training_loss
    expected = mean_loss(model, rows)
    expected.backward()
    assert reported == pytest.approx(expected.item(), rel=1e-4)
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(kept.steps[0], named, rtol=1e-4, atol=1e-7)


def test_a_batch_without_labels_adds_nothing(rows, tmp_path):
    model, kept = decoder(), Gradients()
    bare = rows.select(range(1)).map(lambda row: {"labels": [-100] * len(row["labels"])})
    mixed = concatenate_datasets([rows.select(range(1)), bare])
    trainer = trainer_for(
        model, tmp_path, mixed, callbacks=[kept], max_steps=1, max_grad_norm=0.0,
        per_device_train_batch_size=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    expected = mean_loss(model, rows.select(range(1)))
    assert trainer.train().training_loss == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(kept.steps[0], named, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_is_the_mean_over_response_tokens(rows, tmp_path, batch_size):
    model = decoder()
    found = trainer_for(model, tmp_path, None, rows, per_device_eval_batch_size=batch_size).evaluate()
    expected = mean_loss(model, rows)
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)


def test_training_learns_the_responses(instructions, rows, tmp_path):
    trainer = trainer_for(
        decoder(), tmp_path, rows, rows, num_train_epochs=80, learning_rate=1e-2, per_device_train_batch_size=8,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_perplexity"] < 1.2
    prompts = [prompt_of(word) for word in ("bb", "c")]
    (greedy,) = generate_responses(trainer.model, byte_tokenizer(), prompts, seeds=[1], top_k=1, max_new_tokens=40)
    assert greedy == ["bb", "cc"]
    rouge = rouge_of(trainer.model, byte_tokenizer(), instructions, seeds=[1, 2], top_k=1, max_new_tokens=40)
    assert rouge.of_seeds[0] == rouge.of_seeds[1] == rouge.mean > 70


PROMPTS = ("short", "a much longer prompt", "middle one", "x")


@pytest.mark.parametrize("warp", [{}, {"top_k": 5}, {"top_p": 0.5, "temperature": 2.0}])
def test_draws_do_not_depend_on_the_batch_size(warp):
    options = {"seeds": (1, 2), "max_new_tokens": 12, **warp}
    # far from ties, so that rounding decides nothing
    model = decoder(initializer_range=1.0)
    one, two, four = (
        generate_responses(model, byte_tokenizer(), PROMPTS, batch_size=size, **options) for size in (1, 2, 4)
    )
    assert one == two == four
    assert one[0] != one[1]
    assert len(set(one[0])) == len(PROMPTS)


def test_the_largest_of_noisy_logits_is_a_draw_from_their_softmax():
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.05, 0.0])
    draws = 4000
    noise = GumbelNoise(7, range(draws), torch.device("cpu"))
    made = noise(None, probabilities.log().expand(draws, -1)).argmax(-1)
    found = torch.bincount(made, minlength=5) / draws
    torch.testing.assert_close(found, probabilities, atol=0.025, rtol=0)
    assert found[-1] == 0


def test_sampling_follows_the_models_distribution():
    model, tokenizer = decoder(initializer_range=0.5), byte_tokenizer()
    ids = torch.tensor([tokenizer("x")["input_ids"]])
    warped = model(ids).logits[0, -1].div(3.0).softmax(-1)
    kept = warped.topk(8)
    expected = collections.Counter()
    for token, probability in zip(kept.indices, kept.values / kept.values.sum(), strict=True):
        expected[tokenizer.decode(token)] += probability.item()  # bytes that are no text look alike
    draws = 4000
    (made,) = generate_responses(
        model, tokenizer, ["x"] * draws, seeds=[0], max_new_tokens=1, temperature=3.0, top_k=8, batch_size=500
    )
    assert len(expected) > 4
    found = {text: count / draws for text, count in collections.Counter(made).items()}
    assert found == pytest.approx(expected, abs=4 * 0.4 / draws**0.5)


def test_a_models_own_generation_config_changes_nothing():
    plain, other = decoder(initializer_range=1.0), decoder(initializer_range=1.0)
    settings = {"do_sample": True, "temperature": 0.1, "top_k": 2, "repetition_penalty": 9.0, "max_length": 3}
    settings |= {"no_repeat_ngram_size": 1, "min_new_tokens": 7, "return_dict_in_generate": True}
    other.generation_config.update(**settings)
    options = {"seeds": [4], "max_new_tokens": 8}
    assert generate_responses(plain, byte_tokenizer(), PROMPTS, **options) == generate_responses(
        other.train(), byte_tokenizer(), PROMPTS, **options
    )
    assert other.training
    assert other.generation_config.min_new_tokens == 7


def test_a_model_whose_responses_break_off_is_in_its_mode_again(monkeypatch):
    model = decoder().train()
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_responses(model, byte_tokenizer(), PROMPTS, max_new_tokens=4)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be above 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"max_new_tokens": 255}, "max_new_tokens is 255, and the longest prompt has 20 tokens; .* 256 positions"),
    ],
)
def test_sampling_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        generate_responses(decoder(), byte_tokenizer(), PROMPTS, **options)


def test_tokenizers_without_special_tokens(instructions):
    assert padding_id(byte_tokenizer()) == 256
    assert padding_id(byte_tokenizer(pad_token="<pad>")) == 257
    bare = byte_tokenizer(eos=None)
    with pytest.raises(ValueError, match="neither a pad token nor an EOS token"):
        language_model_collator(bare)
    with pytest.raises(ValueError, match="no EOS token, at which a response ends"):
        generate_responses(decoder(), bare, PROMPTS)


def test_rouge_is_that_of_the_responses(instructions):
    model, options = decoder(), {"seeds": (1, 2), "max_new_tokens": 5}
    prompts = [prompt_of(row["instruction"]) for row in instructions]
    references = instructions["references"][:]
    responses = generate_responses(model, byte_tokenizer(), prompts, **options)
    found = rouge_of(model, byte_tokenizer(), instructions, **options)
    assert found.of_seeds == [rouge_l(some, references) for some in responses]
    assert found.mean == sum(found.of_seeds) / 2
    with pytest.raises(ValueError, match="8 rows of dataset have no reference"):
        rouge_of(model, byte_tokenizer(), instructions.map(lambda row: {"references": []}))
