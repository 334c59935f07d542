"""Taps: what they record is what the model computes, and the model computes what it did without them."""

import copy

import pytest
import torch
from families import BATCH, ENCODERS, FAMILIES, GROUPED, MASK, make
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5EncoderModel,
)

from fastkd.training.attention import TAPS
from fastkd.training.taps import Taps


def recorded(model, **options):
    taps = Taps(model, **options)
    with taps.record() as features:
        output = model(**BATCH)
    return features, output


def maps_of(attention):
    """The attention maps of a layer, from what was recorded of it."""
    query, key = attention.query, attention.key
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.mT * attention.scale + (0.0 if attention.bias is None else attention.bias)
    length = query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = MASK[:, None, None, :].bool()
    if attention.causal:
        seen = seen & (distance >= 0)
    if attention.window is not None:
        seen = seen & (distance.abs() < attention.window)
    return scores.masked_fill(~seen, -1e30).softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_features_are_the_models_own(name):
    model = make(name)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    before = model(**BATCH).logits
    want = eager(**BATCH, output_attentions=True, output_hidden_states=True)
    features, output = recorded(model)
    assert torch.equal(output.logits, before)
    assert len(features.attention) == 3
    for attention, maps in zip(features.attention, want.attentions, strict=True):
        valid = MASK[:, None, :, None]
        torch.testing.assert_close(maps_of(attention) * valid, maps * valid, rtol=1e-5, atol=1e-6)
    assert len(features.hidden) == 4
    same = 4 if name in ENCODERS and name != "modernbert" else 3  # of a decoder transformers gives the normalised last
    for state, expected in zip(features.hidden[:same], want.hidden_states[:same], strict=True):
        torch.testing.assert_close(state * MASK[..., None], expected * MASK[..., None], rtol=1e-5, atol=1e-5)


def test_maps_with_a_bias_of_positions():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 3, "d_ff": 64}
    model = T5EncoderModel(T5Config(vocab_size=50, **sizes, initializer_factor=3.0)).eval()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    want = eager(**BATCH, output_attentions=True).attentions
    features, _ = recorded(model)
    for attention, maps in zip(features.attention, want, strict=True):
        assert attention.bias.std() > 0.1
        valid = MASK[:, None, :, None]
        torch.testing.assert_close(maps_of(attention) * valid, maps * valid, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "map", "weight"), [("bert", "1.attention.self.query", "weight"), ("gpt2", "1.attn.c_attn", "T")]
)
def test_the_outputs_are_those_of_the_maps(name, map, weight):
    model = make(name)
    inputs = {}
    module = next(m for n, m in model.named_modules() if n.endswith(map))
    module.register_forward_pre_hook(lambda m, args: inputs.update(x=args[0]))
    features, _ = recorded(model, attention=False, hidden=False, maps=True)
    matrix = module.weight.T if weight == "T" else module.weight
    torch.testing.assert_close(features.outputs[map], F.linear(inputs["x"], matrix, module.bias))
    assert len(features.outputs) == 3 * (6 if name == "bert" else 4)
    assert not features.attention
    assert not features.hidden


def loss_of(model, taps):
    with taps.record() as features:
        logits = model(**BATCH).logits
    states = sum(state.square().mean() for state in features.hidden)
    scores = sum((a.query.sum(1) @ a.key.sum(1).mT).tanh().mean() for a in features.attention)
    outputs = sum(output.square().mean() for output in features.outputs.values())
    return logits.square().mean() + states + scores + outputs


def gradients(model, call=None):
    taps = Taps(model, maps=True)
    loss_of(model if call is None else call, taps).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_compiled_and_checkpointed_models_have_the_same_gradients(name):
    want = gradients(make(name))
    compiled = make(name)
    torch._dynamo.reset()
    found = {"compiled": gradients(compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))}
    recomputed = make(name).train()
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    for module in recomputed.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for probability in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, probability, None), float):
                setattr(module, probability, 0.0)
    found["recomputed"] = gradients(recomputed)
    for how, got in found.items():
        assert got.keys() == want.keys()
        for parameter, gradient in want.items():
            torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-6, msg=f"{how}: {parameter}")


def test_reentrant_checkpointing_which_would_teach_nothing_is_refused():
    model = make("bert").train()
    taps = Taps(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(ValueError, match=r"in training is called without gradient.*_reentrant': False"),
        taps.record(),
    ):
        model(**BATCH)
    with torch.no_grad(), taps.record() as features:
        model(**BATCH)
    assert len(features.hidden) == 4


def hooks_on(model):
    modules = list(model.modules())
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules), [
        taps for module in modules for taps in vars(module).get(TAPS, [])
    ]


def test_nothing_is_recorded_outside_the_block_and_nothing_is_left_after_close():
    model = make("bert")
    taps = Taps(model, maps=True)
    with taps.record() as features:
        model(**BATCH)
    model(**BATCH)
    assert len(features.hidden) == 4
    assert len(features.attention) == 3
    taps.close()
    assert hooks_on(model) == (0, [])
    with taps.record() as again:
        model(**BATCH)
    for attention, before in zip(again.attention, features.attention, strict=True):
        torch.testing.assert_close(attention.query, before.query)
    assert len(again.hidden) == 4
    assert again.outputs.keys() == features.outputs.keys()


def test_a_model_may_have_several_taps():
    model = make("bert")
    first, second = Taps(model), Taps(model, hidden=False)
    with first.record() as some, second.record() as others:
        model(**BATCH)
    second.close()
    with first.record() as alone:
        model(**BATCH)
    for features in (some, others, alone):
        assert len(features.attention) == 3
    assert others.hidden == []


def test_a_call_without_its_attention_is_refused():
    model = make("bert")
    taps = Taps(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="0 attention calls in 3 layers"), taps.record():
        model(**BATCH)


def test_two_models_of_one_configuration_are_tapped_apart():
    first, second = make("bert"), make("bert")
    second.config = first.config
    both = Taps(first), Taps(second)
    with both[0].record() as features:
        second(**BATCH)
        first(**BATCH)
    assert len(features.attention) == 3


def test_models_that_cannot_be_tapped_are_refused():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    pair = BartForSequenceClassification(BartConfig(**sizes, **heads, encoder_ffn_dim=16, decoder_ffn_dim=16))
    with pytest.raises(ValueError, match="an encoder and a decoder in one"):
        Taps(pair)
    with pytest.raises(ValueError, match="has no stack"):
        Taps(torch.nn.Linear(2, 2))
    own = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    capped = Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8))
    with pytest.raises(ValueError, match="Gemma2Model has no attention but its own, eager one"):
        Taps(capped)
    with pytest.raises(ValueError, match="MPNetModel does not call its attention through"):
        Taps(MPNetModel(MPNetConfig(**own, intermediate_size=16)))
