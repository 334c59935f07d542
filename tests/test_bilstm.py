"""The BiLSTM layer against torch.nn.LSTM in float64, and what must not change its answers."""

import pytest
import torch
from backends import answering, fused, threads
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastkd import reference
from fastkd.ops import bilstm

ERROR = 5e-6
"""Of a hidden state in float32: the bound that docs/bilstm.md states, above what was measured by a factor of four."""
LENGTHS = {"one token": [1], "mixed": [3, 0, 17, 1, 17, 40, 2], "only empty": [0, 0], "none": [], "many": [5] * 70}


def make(lengths, inputs=11, hidden=19, directions=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = [(sum(lengths), inputs), (directions, 4 * hidden, inputs), (directions, 4 * hidden, hidden)]
    x, of_input, recurrent = (torch.randn(*shape, generator=generator) for shape in draw)
    bias = torch.randn(directions, 4 * hidden, generator=generator)
    tensors = (x, of_input / inputs**0.5, recurrent / hidden**0.5, bias)
    x, *weights = (tensor.to(dtype) for tensor in tensors)
    return x, torch.tensor(lengths, dtype=torch.int64), *weights


def torch_layer(x, lengths, of_input, recurrent, bias):
    """The same by torch.nn.LSTM, sequence by sequence, in float64."""
    directions, _, hidden = recurrent.shape
    layer = nn.LSTM(x.shape[1], hidden, bidirectional=directions == 2).double()
    with torch.no_grad():
        for way, suffix in enumerate(["", "_reverse"][:directions]):
            getattr(layer, f"weight_ih_l0{suffix}").copy_(of_input[way])
            getattr(layer, f"weight_hh_l0{suffix}").copy_(recurrent[way])
            getattr(layer, f"bias_ih_l0{suffix}").copy_(bias[way])
            getattr(layer, f"bias_hh_l0{suffix}").zero_()
        sequences = x.double().split(lengths.tolist())
        states = [layer(sequence)[0] for sequence in sequences if len(sequence)]
    return torch.cat(states) if states else x.new_zeros(0, directions * hidden, dtype=torch.float64)


every_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


@every_length
@pytest.mark.parametrize("directions", [1, 2])
def test_the_reference_is_torch_lstm(lengths, directions):
    arguments = make(lengths, directions=directions, dtype=torch.float64)
    assert torch.allclose(reference.bilstm(*arguments), torch_layer(*arguments), rtol=0, atol=1e-13)


@fused
@every_length
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("inputs", "hidden"), [(1, 1), (11, 19), (64, 32), (30, 130)])
def test_it_is_torch_lstm(lengths, directions, inputs, hidden):
    arguments = make(lengths, inputs, hidden, directions)
    with answering("bilstm", "cpu"):
        got = bilstm(*arguments)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), torch_layer(*arguments), rtol=0, atol=ERROR)


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_at_the_end(dtype):
    x, lengths, *weights = make(LENGTHS["mixed"], dtype=dtype)
    wide = bilstm(x.float(), lengths, *(w.float() for w in weights))
    assert torch.equal(bilstm(x, lengths, *weights), wide.to(dtype))


@fused
def test_a_sequence_has_the_same_bits_in_any_company_and_on_any_threads():
    x, lengths, *weights = make([7, 64, 1, 64, 30] * 30)
    with threads(1):
        expected = bilstm(x, lengths, *weights).split(lengths.tolist())
    with threads(2):
        for got, want in zip(bilstm(x, lengths, *weights).split(lengths.tolist()), expected, strict=True):
            assert torch.equal(got, want)
    for i in (0, 1, 77):
        sequence = x.split(lengths.tolist())[i]
        assert torch.equal(bilstm(sequence, lengths[i : i + 1], *weights), expected[i])


@fused
def test_strides_do_not_matter():
    x, lengths, *weights = make(LENGTHS["mixed"])
    strided = [tensor.mT.contiguous().mT for tensor in (x, *weights)]
    assert not strided[0].is_contiguous()
    assert torch.equal(bilstm(strided[0], lengths, *strided[1:]), bilstm(x, lengths, *weights))


@fused
def test_opcheck():
    torch.library.opcheck(torch.ops.fastkd.bilstm.default, make(LENGTHS["mixed"]))


@fused
def test_it_compiles_once_for_all_batches():
    counter = CompileCounter()
    compiled = torch.compile(bilstm, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([3, 5, 1], [2, 9, 4, 6], [1, 1, 30, 2, 7]):  # no length of one dimension recurs in another
        x, lengths, *weights = make(lengths)
        assert torch.equal(compiled(x, lengths, *weights), bilstm(x, lengths, *weights))
    assert counter.frame_count == 1


def test_no_gradient_is_refused_not_left_out():
    x, lengths, *weights = (tensor.to("meta") for tensor in make([3, 5]))
    weights[1].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient on meta"):
        bilstm(x, lengths, *weights)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x.tolist(), TypeError, "x must be a tensor, got list"),
        (1, lambda n: n.tolist(), TypeError, "lengths must be a tensor, got list"),
        (0, lambda x: x[0], ValueError, "x must be .tokens, inputs."),
        (0, lambda x: x.long(), TypeError, "x must be float32"),
        (0, lambda x: x[:, 1:], ValueError, "weight_input must be .2, 76, 10."),
        (1, lambda n: n.int(), ValueError, "lengths must be .sequences,. int64"),
        (1, lambda n: n + 1, ValueError, "add up to the 8 rows"),
        (1, lambda n: torch.tensor([-1, 9]), ValueError, "at least 0"),
        (3, lambda w: w[:, 1:], ValueError, "weight_recurrent must be"),
        (3, lambda w: w[0], ValueError, "weight_recurrent must be"),
        (4, lambda b: b[:1], ValueError, "bias must be .2, 76."),
        (4, lambda b: b.to("meta"), ValueError, "bias is on meta"),
    ],
)
def test_bad_input_is_named(place, change, error, message):
    arguments = list(make([3, 5]))
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        bilstm(*arguments)


@fused
@pytest.mark.parametrize("lengths", [[3, 4], [3, 6], [-1, 9], [9, -1]])
def test_the_op_itself_reads_nothing_outside_its_tensors(lengths):
    x, _, *weights = make([3, 5])
    with pytest.raises(RuntimeError, match="add up"):
        torch.ops.fastkd.bilstm(x, torch.tensor(lengths), *weights)
