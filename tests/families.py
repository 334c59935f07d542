"""A small model, with random weights, of each kind of Transformer that the students are made of."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = 50
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2_SIZES = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "initializer_range": 0.2}
DISTILBERT_SIZES = {"vocab_size": WORDS, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
OPT_SIZES = {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "initializer_range")}
GROUPED = {**SIZES, **SPECIAL, "num_key_value_heads": 2}
LOCAL = {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}

ENCODERS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=1)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT_SIZES)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
    "modernbert": lambda: ModernBertForSequenceClassification(ModernBertConfig(**SIZES, **SPECIAL, **LOCAL)),
}
DECODERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, **SPECIAL)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT_SIZES, **SPECIAL, ffn_dim=64, word_embed_proj_dim=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=5)),
}
FAMILIES = {**ENCODERS, **DECODERS}

IDS = torch.randint(3, WORDS, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def make(name):
    torch.manual_seed(0)
    return FAMILIES[name]().eval()
