"""Two processes train span models and decoders as one: the same parameters and the same scores."""

import pytest
import torch
from test_distributed import launch

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from decoder_samples import byte_tokenizer, decoder, write_lines
from test_language_model import LENGTHS, ROWS
from test_language_model import trainer_for as language_model_trainer
from test_spans import load
from test_spans import trainer_for as span_trainer
from tiny import bert_config
from transformers import BertForQuestionAnswering
from fastkd.data.instructions import encode_instructions, load_instructions

folder, kind, name, accumulation = sys.argv[1:]
here = Path(folder) / os.environ.get("RANK", "0")
here.mkdir(exist_ok=True)
arguments = {
    "num_train_epochs": 2, "max_grad_norm": 0.0, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": int(accumulation),
}
if kind == "spans":
    questions, windows = load(here, unanswerable=True)
    torch.manual_seed(0)
    model = BertForQuestionAnswering(bert_config())
    trainer = span_trainer(model, here, windows.select(range(8)), windows.select(range(15)), questions, **arguments)
else:
    rows = encode_instructions(
        load_instructions(write_lines(here / "rows.jsonl", *ROWS, *ROWS)), byte_tokenizer(), **LENGTHS
    )
    trainer = language_model_trainer(decoder(), here, rows, rows.select(range(7)), **arguments)
trainer.train()
wanted = ("eval_exact_match", "eval_f1", "eval_f1_best", "eval_perplexity")
metrics = {name: value for name, value in trainer.evaluate().items() if name in wanted}
torch.save({"model": trainer.model.state_dict(), "metrics": metrics}, f"{folder}/{name}-{here.name}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spans", "responses"])
def test_two_processes_equal_one(tmp_path, kind):
    launch(tmp_path, SCRIPT, [str(tmp_path), kind, "two", "1"], 2)
    launch(tmp_path, SCRIPT, [str(tmp_path), kind, "one", "2"], 1)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    assert one["metrics"]
    for process in two:
        torch.testing.assert_close(process["model"], one["model"], rtol=1e-3, atol=1e-5)
        assert process["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
