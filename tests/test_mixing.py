"""Mixup inside models: the point where embeddings are mixed, masks and token types of mixtures, pads."""

import pytest
import torch
from tiny import bert_config
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from fastkd.mixing import EmbeddingMixer
from fastkd.mixup import Mix
from fastkd.students import BiAttentiveLSTM, BiAttentiveLSTMConfig

MIX = Mix(torch.tensor([2, 0, 1]), torch.tensor([0.7, 0.25, 0.9]))
IDS = torch.tensor([[2, 5, 6, 3, 7, 3], [2, 8, 3, 0, 0, 0], [2, 9, 10, 3, 0, 0]])
MASK = (IDS != 0).long()
TYPES = torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6])
EXAMPLES = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return BertModel(bert_config(initializer_range=1.0)).eval()


def mixed(tensor, mix=MIX):
    lam = mix.lam.reshape(-1, *[1] * (tensor.dim() - 1))
    return lam * tensor + (1 - lam) * tensor[mix.permutation]


def input_of(module, call):
    """What a module was given during a call."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    call()
    handle.remove()
    return seen[0]


def test_sum_mixes_words_types_and_positions_together(bert):
    normalisation = bert.embeddings.LayerNorm
    plain = input_of(normalisation, lambda: bert(**EXAMPLES))
    mixer = EmbeddingMixer(bert, stage="sum")
    with mixer(MIX):
        got = input_of(normalisation, lambda: bert(**mixer.inputs(EXAMPLES, MIX)))
    torch.testing.assert_close(got, mixed(plain), rtol=1e-5, atol=1e-6)


def test_word_keeps_the_types_of_the_example_itself(bert):
    table = bert.embeddings
    mixer = EmbeddingMixer(bert, stage="word", mask="first")
    with mixer(MIX):
        got = input_of(table.LayerNorm, lambda: bert(**mixer.inputs(EXAMPLES, MIX)))
    words = mixed(table.word_embeddings.weight[IDS])
    want = words + table.token_type_embeddings.weight[TYPES] + table.position_embeddings.weight[:6]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_post_ln_mixes_what_the_embeddings_give(bert):
    plain = bert.embeddings(IDS, TYPES)
    mixer = EmbeddingMixer(bert, stage="post_ln")
    with mixer(MIX):
        got = bert.embeddings(IDS, TYPES)
    torch.testing.assert_close(got, mixed(plain), rtol=1e-5, atol=1e-6)
    mixer.close()
    assert not any(module._forward_hooks for module in bert.modules())
    with mixer(MIX):
        torch.testing.assert_close(bert.embeddings(IDS, TYPES), got, rtol=0, atol=0)


def test_zero_pads_leave_a_share_of_the_partner_alone(bert):
    bert.embeddings.word_embeddings.weight.data[0] = 1.0  # a released checkpoint's pads are not zero either
    mixer = EmbeddingMixer(bert, pads="zero")
    with mixer(MIX, MASK):
        got = bert.get_input_embeddings()(IDS)
    words = bert.get_input_embeddings().weight[IDS] * MASK[..., None]
    torch.testing.assert_close(got, mixed(words), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="real is None"), mixer(MIX):
        pass


def test_masks_and_types_of_mixtures(bert):
    union = EmbeddingMixer(bert).inputs(EXAMPLES, MIX)
    assert union["attention_mask"].tolist() == [[1] * 6, [1] * 6, [1, 1, 1, 1, 0, 0]]
    assert union["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [0] * 6]
    assert EmbeddingMixer(bert, stage="sum").inputs(EXAMPLES, MIX)["token_type_ids"] is TYPES
    assert EmbeddingMixer(bert, mask="first").inputs(EXAMPLES, MIX)["attention_mask"] is MASK


def test_outside_the_block_the_model_is_as_it_was(bert):
    before = bert(**EXAMPLES).last_hidden_state
    mixer = EmbeddingMixer(bert)
    torch.testing.assert_close(bert(**EXAMPLES).last_hidden_state, before, rtol=0, atol=0)
    with pytest.raises(RuntimeError), mixer(MIX):
        raise RuntimeError
    torch.testing.assert_close(bert(**EXAMPLES).last_hidden_state, before, rtol=0, atol=0)


SIZES = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES = {
    "bert": BertConfig(**SIZES, max_position_embeddings=32),
    "mpnet": MPNetConfig(**SIZES, max_position_embeddings=32, pad_token_id=1),
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=32, pad_token_id=1),
    "electra": ElectraConfig(**SIZES, embedding_size=8, max_position_embeddings=32),
    "distilbert": DistilBertConfig(
        vocab_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=32
    ),
    "modernbert": ModernBertConfig(
        **SIZES, max_position_embeddings=32, **dict.fromkeys(("cls_token_id", "bos_token_id"), 2),
        **dict.fromkeys(("sep_token_id", "eos_token_id"), 3), pad_token_id=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["word", "sum", "post_ln"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_mixed_with_one_like_it_is_itself(family, stage):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family]).eval()
    mixer = EmbeddingMixer(model, stage=stage)
    ids = torch.tensor([[2, 5, 6, 3], [2, 5, 6, 3], [2, 9, 10, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = model(**batch).logits
    mix = Mix(torch.tensor([1, 2, 0]), torch.tensor([0.3, 0.0, 0.6]))
    with mixer(mix):
        logits = model(**mixer.inputs(batch, mix)).logits
    torch.testing.assert_close(logits[0], plain[0], rtol=1e-5, atol=1e-6)  # both partners are the same
    torch.testing.assert_close(logits[1], plain[2], rtol=1e-5, atol=1e-6)  # the partner alone
    assert (logits[2] - plain[2]).abs().max() > 1e-6
    logits[2].sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[[5, 9]].abs().amin(1).min() > 0  # tokens of both


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mask", ["union", "first"])
@pytest.mark.parametrize("stage", ["word", "sum", "post_ln"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_one_example_is_that_example_whatever_its_partners_length(family, stage, mask, side):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(20.0)  # or the first token would hardly see the others
    ids = IDS if side == "right" else torch.stack([row.roll(int((row == 0).sum())) for row in IDS])
    batch = {"input_ids": ids + FAMILIES[family].pad_token_id, "attention_mask": (ids != 0).long()}
    plain = model(**batch).logits
    mixer = EmbeddingMixer(model, stage=stage, mask=mask)
    # Of lengths 6, 3 and 4: partners that are shorter where λ is 1, longer or equal where it is 0.
    mix = Mix(torch.tensor([1, 0, 2]), torch.tensor([1.0, 0.0, 0.0]))
    with mixer(mix):
        got = model(**mixer.inputs(batch, mix)).logits
    same = [0, 0, 2] if mask == "union" else [0, None, 2]  # "first" cuts the longer partner
    for row, example in enumerate(same):
        if example is not None:
            torch.testing.assert_close(got[row], plain[example], rtol=1e-5, atol=1e-5)
    assert (plain[0] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("pads", ["embed", "zero"])
@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_sum_mixes_positions_that_are_token_numbers(family, pads):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family]).eval()
    norm = next(module for name, module in model.named_modules() if name.endswith("embeddings.LayerNorm"))
    batch = {"input_ids": IDS + FAMILIES[family].pad_token_id, "attention_mask": MASK}
    plain = input_of(norm, lambda: model(**batch))
    mixer = EmbeddingMixer(model, stage="sum", pads=pads)
    with mixer(MIX, MASK):
        got = input_of(norm, lambda: model(**mixer.inputs(batch, MIX)))
    torch.testing.assert_close(got, mixed(plain if pads == "embed" else plain * MASK[..., None]), rtol=1e-5, atol=1e-6)


def bilstm():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "embedding_size": 8, "projection_size": 8, "hidden_size_per_direction": 8}
    return BiAttentiveLSTM(BiAttentiveLSTMConfig(**sizes, head_size=8)).eval()


def test_the_bilstm_reads_a_mixture_as_it_reads_mixed_words():
    """A pair and single sentences of different lengths, against a model whose table holds the mixed words."""
    model = bilstm()
    mixer = EmbeddingMixer(model)
    with mixer(MIX):
        got = model(**mixer.inputs(EXAMPLES, MIX)).logits
    words = mixed(model.word_embeddings.weight[IDS])
    other = bilstm()
    other.word_embeddings = torch.nn.Embedding.from_pretrained(words.flatten(0, 1))
    ids = torch.arange(18).reshape(3, 6)
    want = other(**(mixer.inputs(EXAMPLES, MIX) | {"input_ids": ids})).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_pads_before_the_text_mix_as_pads_after_it_do():
    model = bilstm()
    mixer = EmbeddingMixer(model)
    mix = Mix(torch.tensor([1, 0]), torch.tensor([0.3, 0.8]))
    equal = {
        "input_ids": torch.tensor([[2, 8, 3, 0], [2, 9, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]] * 2),
    }
    left = {name: value.roll(1, 1) for name, value in equal.items()}
    logits = []
    for batch in (equal, left):
        with mixer(mix):
            logits.append(model(**mixer.inputs(batch, mix)).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6)
    assert (logits[0] - model(**equal).logits).abs().max() > 1e-6


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_compiled_models_mix(family):
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES[family]).eval()
    batch = {"input_ids": IDS + FAMILIES[family].pad_token_id, "attention_mask": MASK}
    mixer = EmbeddingMixer(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = compiled(**batch).last_hidden_state
    with mixer(MIX):
        want, got = (each(**mixer.inputs(batch, MIX)).last_hidden_state for each in (model, compiled))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - plain).abs().max() > 1e-3
    torch.testing.assert_close(compiled(**batch).last_hidden_state, plain, rtol=0, atol=0)


def test_bad_options_are_refused(bert):
    with pytest.raises(ValueError, match="stage must be one of word, sum, post_ln, got 'pre'"):
        EmbeddingMixer(bert, stage="pre")
    with pytest.raises(ValueError, match="mask must be one of union, first, got 'both'"):
        EmbeddingMixer(bert, mask="both")
    with pytest.raises(ValueError, match="BiAttentiveLSTM does not normalise its embeddings"):
        EmbeddingMixer(bilstm(), stage="post_ln")
