"""The examples of readers and decoders run as they stand, on tiny models."""

import runpy

import torch
from decoder_samples import byte_tokenizer, decoder, write_lines
from squad_samples import learnable, write
from subprocesses import ROOT
from tiny import tokenizer
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering


def run(name, arguments, folder, monkeypatch):
    example = ROOT / "examples" / name
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [str(example), *map(str, arguments)])
    runpy.run_path(str(example))


def test_a_reader(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForQuestionAnswering(BertConfig(vocab_size=16, max_position_embeddings=256, **sizes)).save_pretrained(
        tmp_path / "teacher"
    )
    tokenizer(model_max_length=256).save_pretrained(tmp_path / "teacher")
    for split in ("train", "dev"):
        write(tmp_path / "squad" / f"{split}.json", *learnable())
    run("distil_squad.py", [tmp_path / "teacher", tmp_path / "squad"], tmp_path, monkeypatch)
    assert "eval_f1" in capsys.readouterr().out
    student = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "runs" / "reader")
    assert student.config.quantization_config.ranks


def test_a_decoder(tmp_path, monkeypatch, capsys):
    decoder(positions=512).save_pretrained(tmp_path / "teacher")
    byte_tokenizer(model_max_length=512).save_pretrained(tmp_path / "teacher")
    rows = [{"instruction": "say it", "output": letter * 3} for letter in "abcd"]
    files = [write_lines(tmp_path / name, *rows) for name in ("train.jsonl", "heldout.jsonl")]
    run("distil_decoder.py", [tmp_path / "teacher", *files], tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "eval_perplexity" in printed
    assert "Rouge(mean=" in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "decoder").config.quantization_config.ranks
