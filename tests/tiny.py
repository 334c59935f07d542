"""A tokenizer, an encoder and GLUE files small enough to train in a test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "plot", "very", "not", "the", "a"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tokenizer(token_types=True, **options):
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if token_types else ["input_ids", "attention_mask"]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, model_input_names=names, **special, **options)


def bert_config(**options):
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**sizes, **dropout, intermediate_size=32, max_position_embeddings=32, **options)


def save_encoder(folder: Path, **options) -> str:
    torch.manual_seed(0)
    BertModel(bert_config(**options)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_glue(data_dir: Path, rows: int = 24) -> Path:
    """SST-2 and STS-B whose answers are in the words."""
    pick = torch.Generator().manual_seed(0)
    draw = lambda count: int(torch.randint(count, (), generator=pick))  # noqa: E731
    for split in ("train", "dev"):
        sentences = [(f"the {WORDS[draw(3) + 3 * (i % 2)]} film", 1 - i % 2) for i in range(rows)]
        pairs = [(WORDS[draw(3)], WORDS[draw(3) + 3 * (i % 2)], 5.0 - 4 * (i % 2)) for i in range(rows)]
        tables = {
            "SST-2": ["sentence\tlabel", *(f"{text}\t{label}" for text, label in sentences)],
            "STS-B": ["sentence1\tsentence2\tscore", *(f"{a}\tvery {b}\t{score}" for a, b, score in pairs)],
        }
        for folder, lines in tables.items():
            (data_dir / folder).mkdir(parents=True, exist_ok=True)
            (data_dir / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return data_dir


def same_answers(got, want):
    """Logits of two models with one set of weights: a BLAS may round by where in memory the weights lie."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
