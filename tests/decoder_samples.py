"""A byte-level tokenizer, a decoder and instruction files small enough for a test."""

import gzip
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def byte_tokenizer(eos="<end>", **options):
    """Every byte is a token. Without a pad token, as decoders often are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=eos, **options)


def decoder(positions=256, **options):
    torch.manual_seed(0)
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=positions, bos_token_id=256, eos_token_id=256,
        **dropout, **options,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def write_lines(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path
