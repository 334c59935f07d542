"""Instructions: every format that is read, errors with lines, prompts cut where they may be, labels of the response."""

import sys

import pytest
from decoder_samples import byte_tokenizer, write_lines

from fastkd.data.instructions import cut_prompt, encode_instructions, load_instructions, prompt_of
from fastkd.data.rouge import rouge_l

DOLLY = {"instruction": "Sum up.", "context": "a film", "response": "good", "category": "x"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_formats(tmp_path, name):
    rows = load_instructions(
        write_lines(
            tmp_path / name,
            DOLLY,
            {"instruction": "Sum up.", "input": "", "output": ["good", "fine"]},
            {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}]},
            {"question_id": 1, "text": "How?", "category": "generic"},
        )
    )
    assert list(rows) == [
        {"instruction": "Sum up.", "input": "a film", "references": ["good"]},
        {"instruction": "Sum up.", "input": "", "references": ["good", "fine"]},
        {"instruction": "Add.", "input": "1 2", "references": ["3"]},
        {"instruction": "Add.", "input": "2 2", "references": ["4"]},
        {"instruction": "How?", "input": "", "references": []},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"output": "good"}, "'instruction' or 'text' is missing; it must be a text"),
        ({"instruction": 3}, "'instruction' or 'text' is int"),
        ({"instruction": " ", "output": "good"}, "the instruction is empty"),
        ({"instruction": "a", "input": 3}, "'input' or 'context' is int"),
        ({"instruction": "a", "output": ""}, "the output must be a text that is not empty, or a list of such, not ''"),
        ({"instruction": "a", "response": ["b", 1]}, r"a list of such, not \['b', 1\]"),
        ({"instruction": "a", "instances": {"input": "b"}}, "'instances' must be a list of objects"),
        ([1], "a JSON object is needed, not list"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, row, message):
    path = write_lines(tmp_path / "rows.jsonl", DOLLY, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message}"):
        load_instructions(path)


def test_null_is_as_good_as_missing(tmp_path):
    row = {"instruction": "a", "input": None, "context": None, "output": None, "response": "b"}
    (loaded,) = load_instructions(write_lines(tmp_path / "rows.jsonl", row))
    assert loaded == {"instruction": "a", "input": "", "references": ["b"]}


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"none\.jsonl has no rows"):
        load_instructions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.jsonl\.gz"):
        load_instructions(tmp_path / "rows.json")
    packed = write_lines(tmp_path / "rows.jsonl.gz", DOLLY)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is damaged or truncated"):
        load_instructions(packed)


def test_prompts():
    begin = "Below is an instruction that describes a task"
    wish = "Write a response that appropriately completes the request.\n\n"
    assert prompt_of("Do {it}.") == f"{begin}. {wish}### Instruction:\nDo {{it}}.\n\n### Response:\n"
    assert prompt_of("Do.", "a") == (
        f"{begin}, paired with an input that provides further context. {wish}"
        "### Instruction:\nDo.\n\n### Input:\na\n\n### Response:\n"
    )


def test_a_long_prompt_loses_the_end_of_its_input_or_instruction():
    tokenizer = byte_tokenizer()
    whole = len(prompt_of("Sum up.", "0123456789"))
    row = {"instruction": "Sum up.", "input": "0123456789"}
    assert cut_prompt(row, tokenizer, whole) == prompt_of("Sum up.", "0123456789")
    assert cut_prompt(row, tokenizer, whole - 7) == prompt_of("Sum up.", "012")
    with pytest.raises(ValueError, match=f"max_prompt_length is {whole - 10}; the prompt of 'Sum up.' needs more"):
        cut_prompt(row, tokenizer, whole - 10)
    row = {"instruction": "Sum up.", "input": "éé漢"}  # tokens that end inside a character
    assert cut_prompt(row, tokenizer, whole - 4) == prompt_of("Sum up.", "éé")
    with pytest.raises(ValueError, match="needs more"):
        cut_prompt(row, tokenizer, whole - 9)
    row = {"instruction": "Sum up.", "input": ""}
    assert cut_prompt(row, tokenizer, len(prompt_of("Sum"))) == prompt_of("Sum")


def encoded(folder, *rows, tokenizer=None, **lengths):
    return encode_instructions(
        load_instructions(write_lines(folder / "rows.jsonl", *rows)), tokenizer or byte_tokenizer(), **lengths
    )


def test_labels_are_the_response_and_the_end_of_text(tmp_path):
    tokenizer = byte_tokenizer()
    rows = list(encoded(tmp_path, DOLLY, DOLLY | {"response": ["bad", "poor"]}))
    for index, (row, response) in enumerate(zip(rows, ("good", "bad"), strict=True)):
        prompt = prompt_of("Sum up.", "a film")
        assert tokenizer.decode(row["input_ids"]) == prompt + response + "<end>"
        assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
        assert row["attention_mask"] == [1] * row["length"]
        assert (row["row"], row["length"]) == (index, len(prompt) + len(response) + 1)


def test_a_cut_response_has_no_end_of_text(tmp_path):
    prompt = prompt_of("Sum up.", "a film")
    (row,) = encoded(tmp_path, DOLLY, max_length=len(prompt) + 4, max_prompt_length=len(prompt))
    assert byte_tokenizer().decode(row["input_ids"]) == prompt + "good"
    (row,) = encoded(tmp_path, DOLLY, max_length=len(prompt) + 2, max_prompt_length=len(prompt) - 3)
    assert byte_tokenizer().decode(row["input_ids"]) == prompt_of("Sum up.", "a f") + "good<end>"


def test_what_cannot_be_encoded(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 has no response to learn: 'How\?'"):
        encoded(tmp_path, DOLLY, {"text": "How?"})
    with pytest.raises(ValueError, match="tokenizer has no EOS token"):
        encoded(tmp_path, DOLLY, tokenizer=byte_tokenizer(eos=None))
    with pytest.raises(ValueError, match="max_length is 256; it must be more than max_prompt_length, which is 256"):
        encoded(tmp_path, DOLLY, max_length=256)
    with pytest.raises(ValueError, match="at most 500, what the model takes"):
        encoded(tmp_path, DOLLY, tokenizer=byte_tokenizer(model_max_length=500))


def test_rouge_takes_the_best_reference_and_stems():
    # LCS of 2 words among 3 and 4: F = 2 · (2/3) · (2/4) / (2/3 + 2/4) = 4/7
    found = rouge_l(["the film ends", "he runs"], [["nothing", "film the badly ends"], ["he run"]])
    assert found == pytest.approx(100 * (4 / 7 + 1) / 2)


def test_rouge_needs_references_and_its_package(monkeypatch):
    for references in ([["a"], []], [["a"]]):
        with pytest.raises(ValueError, match="each response needs at least one reference"):
            rouge_l(["a", "b"], references)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"fastkd\[generation\]"):
        rouge_l(["a"], [["a"]])
