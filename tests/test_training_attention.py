"""The attention function of training: the same function as transformers', by another path in half precision."""

import pytest
import torch
from families import BATCH, FAMILIES, make
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastkd import ops
from fastkd.reference.tolerance import GRADIENT, VALUE, assert_close
from fastkd.training import attention
from fastkd.training.attention import sdpa, use_own_attention
from fastkd.training.step_mean import StepMeanTrainer


@pytest.fixture(params=[True, False], ids=["kernels", "float32"])
def by_kernels(request, monkeypatch):
    """Whether the machine is taken for one on which the kernels are the faster path; they answer on every CPU."""
    monkeypatch.setattr(attention, "_HAS_TILES", request.param)
    return request.param


def operands(dtype, key_heads=4):
    torch.manual_seed(0)
    return [torch.randn(2, heads, 9, 8).to(dtype).requires_grad_() for heads in (4, key_heads, key_heads)]


def mask(kind):
    seen = torch.rand(2, 1, 9, 9) > 0.3
    seen[..., 0] = True
    return {"none": None, "bool": seen, "float": torch.where(seen, 0.0, -torch.inf)}[kind]


class Encoder(torch.nn.Module):
    is_causal = False


class Decoder(torch.nn.Module):
    is_causal, num_key_value_groups = True, 2


def result(function, dtype, kind, layer=Encoder, **options):
    tensors = operands(dtype, key_heads=2 if layer is Decoder else 4)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
        output, _ = function(layer(), *tensors, mask(kind), **options)
    return output, torch.autograd.grad(output.float().square().sum(), tensors)


BIAS = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("none", {}),
        ("none", {"scaling": 0.3}),
        ("bool", {"scaling": 0.3}),
        ("float", {"scaling": 0.3}),
        ("none", {"is_causal": True}),
        ("none", {"position_bias": BIAS}),
        ("none", {"layer": Decoder}),
        ("bool", {"layer": Decoder}),
    ],
)
def test_half_precision_is_as_close_as_transformers_own(by_kernels, kind, options):
    (output, gradients), (theirs, their_gradients) = (
        result(function, torch.bfloat16, kind, **options) for function in (sdpa, sdpa_attention_forward)
    )
    exact, exact_gradients = result(sdpa_attention_forward, torch.float64, kind, **options)
    assert output.dtype == torch.bfloat16
    found = zip((output, *gradients), (theirs, *their_gradients), (exact, *exact_gradients), strict=True)
    for index, (mine, other, want) in enumerate(found):
        assert_close(mine.detach(), want.detach(), other.detach(), GRADIENT if index else VALUE)


@pytest.mark.parametrize(
    ("dtype", "kind", "taken"),
    [(torch.bfloat16, "bool", True), (torch.bfloat16, "float", False), (torch.float16, "none", False)],
)
def test_the_kernels_answer_where_they_are_the_faster_path(by_kernels, monkeypatch, dtype, kind, taken):
    calls = []
    monkeypatch.setattr(attention, "attention", lambda *a: calls.append(a) or ops.attention.attention(*a))
    result(sdpa, dtype, kind)
    assert len(calls) == (taken and by_kernels)


def test_autocast_means_rotated_queries_and_keys_too(by_kernels, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "attention", lambda *a: calls.append(a) or ops.attention.attention(*a))
    query, key, value = operands(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = sdpa(Encoder(), query, key, value, None)
        output, _ = sdpa(Encoder(), query.float(), key.float(), value, None)
    assert torch.equal(output, wanted)
    assert len(calls) == 2 * by_kernels


def test_a_lowered_instruction_set_means_the_path_without_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    for target, has in ((None, True), ("avx512", True), ("avx512-no-amx", False), ("avx2", False)):
        monkeypatch.delenv("FASTKD_CPU_TARGET", raising=False)
        if target is not None:
            monkeypatch.setenv("FASTKD_CPU_TARGET", target)
        assert attention._has_tiles() == has


def test_a_softcap_is_refused_as_transformers_does(by_kernels):
    with pytest.raises(ValueError, match="softcap"):
        result(sdpa, torch.bfloat16, "none", softcap=3.0)


@pytest.mark.parametrize(
    ("dtype", "learns", "dropout", "inside"),
    [
        (torch.bfloat16, True, 0.0, torch.float32),
        (torch.float16, True, 0.0, torch.float32),
        (torch.bfloat16, True, 0.5, torch.bfloat16),
        (torch.bfloat16, False, 0.0, torch.bfloat16),
    ],
)
def test_gradients_of_half_precision_are_taken_in_float32(monkeypatch, dtype, learns, dropout, inside):
    seen = []

    def spy(module, *tensors, **options):
        seen.append(({x.dtype for x in tensors}, torch.is_autocast_enabled("cpu")))
        return sdpa_attention_forward(module, *tensors, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    tensors = [x.detach().requires_grad_(learns) for x in operands(dtype)]
    with torch.autocast("cpu", dtype):
        output, _ = sdpa(torch.nn.Module(), *tensors, mask("float").to(dtype), is_causal=False, dropout=dropout)
    assert seen == [({inside}, inside != torch.float32)]
    assert output.dtype == dtype


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_model_answers_as_before(name, tmp_path):
    model = make(name)
    before = model(**BATCH).logits
    StepMeanTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))
    assert torch.equal(model(**BATCH).logits, before)
    assert "fastkd_sdpa" in {getattr(part.config, "_attn_implementation", None) for part in encoders(model)}
    model.save_pretrained(tmp_path / "saved")
    assert "fastkd" not in (tmp_path / "saved" / "config.json").read_text()


def encoders(model):
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def test_an_eager_model_stays_eager():
    model = make("bert")
    model.set_attn_implementation("eager")
    use_own_attention(model)
    assert model.config._attn_implementation == "eager"
