"""The gradient of the BiLSTM layer, by its kernels and without, and the student's layer that trains by it."""

import copy

import pytest
import torch
from backends import fused, threads
from test_bilstm import LENGTHS, make
from tolerance import GRADIENT, assert_close

from fastkd import reference
from fastkd.ops import bilstm
from fastkd.students.bilstm import BiLSTM

HIDDEN = {"kernels": 48, "plain torch": 19}


def output_and_gradients(layer, x, lengths, *weights):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights)]
    output = layer(leaves[0], lengths, *leaves[1:])
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))


def wide(arguments):
    return (tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments)


@pytest.mark.parametrize("lengths", ["one token", "mixed", "many"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_gradients(lengths, directions, hidden):
    arguments = make(LENGTHS[lengths], 11, hidden, directions)
    exact = output_and_gradients(reference.bilstm, *wide(arguments))
    plain = output_and_gradients(reference.bilstm, *arguments)
    for got, *others in zip(output_and_gradients(bilstm, *arguments), exact, plain, strict=True):
        assert_close(got, *others, GRADIENT)


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("lengths", ["only empty", "none"])
def test_no_tokens_have_gradients_of_zero(lengths, hidden):
    arguments = make(LENGTHS[lengths], hidden=hidden)
    output, of_x, *others = output_and_gradients(bilstm, *arguments)
    assert (output.shape, of_x.shape) == ((0, 2 * hidden), (0, 11))
    assert all(gradient.eq(0).all() for gradient in others)


@fused
def test_what_the_kernels_cannot_give_is_refused_not_left_out():
    x, lengths, *weights = make(LENGTHS["mixed"], hidden=48)
    states = bilstm(x.requires_grad_(), lengths, *weights)
    with pytest.raises(RuntimeError, match="the fused bilstm has no second derivative"):
        torch.autograd.grad(states.sum(), x, create_graph=True)
    gates = torch.randn(len(x), 2, 192, requires_grad=True)
    states, *kept = torch.ops.fastkd.lstm_forward(gates, lengths, weights[1])
    assert [tensor.requires_grad for tensor in (states, *kept)] == [True, False, False]


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_under_autocast(dtype):
    arguments = make(LENGTHS["mixed"], 11, 48, dtype=dtype)
    exact = output_and_gradients(reference.bilstm, *wide(arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = output_and_gradients(reference.bilstm, *arguments)
        got = output_and_gradients(bilstm, *arguments)
    for mine, *others in zip(got, exact, plain, strict=True):
        assert mine.dtype == dtype
        assert_close(mine, *others, GRADIENT)


@fused
def test_a_sequence_has_the_same_gates_gradient_in_any_company_and_on_any_threads():
    x, lengths, of_input, recurrent, bias = make([7, 64, 1, 64, 30] * 30, hidden=32)
    gates = (x @ of_input.flatten(0, 1).T).view(len(x), *bias.shape)
    grad = torch.randn(len(x), 64, generator=torch.Generator().manual_seed(1))

    def results(gates, grad, lengths):
        states, *kept = torch.ops.fastkd.lstm_forward(gates, lengths, recurrent)
        return states, torch.ops.fastkd.lstm_backward(grad, lengths, recurrent, *kept)

    with threads(1):
        expected = [result.split(lengths.tolist()) for result in results(gates, grad, lengths)]
    with threads(2):
        for got, want in zip(results(gates, grad, lengths), expected, strict=True):
            assert torch.equal(got, torch.cat(want))
    rows = [tensor.split(lengths.tolist()) for tensor in (gates, grad)]
    for i in (0, 1, 77):
        for got, want in zip(results(rows[0][i], rows[1][i], lengths[i : i + 1]), expected, strict=True):
            assert torch.equal(got, want[i])


@fused
@pytest.mark.parametrize("dense", [True, False])
def test_opcheck(dense):
    layout = (lambda t: t) if dense else (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    x, lengths, of_input, recurrent, bias = make(LENGTHS["mixed"], hidden=16)
    gates, recurrent = layout((x @ of_input.flatten(0, 1).T).view(len(x), *bias.shape)), layout(recurrent)
    leaves = (gates.requires_grad_(), lengths, recurrent.requires_grad_())
    torch.library.opcheck(torch.ops.fastkd.lstm_forward.default, leaves)
    with torch.no_grad():
        _, cells, activations = torch.ops.fastkd.lstm_forward(*leaves)
        kept = (recurrent.detach(), cells, layout(activations))
        torch.library.opcheck(torch.ops.fastkd.lstm_backward.default, (torch.randn(len(x), 32), lengths, *kept))


@fused
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda gates: gates[:, :1], "gates must be"),
        (1, lambda lengths: lengths + 1, "add up"),
        (2, lambda weight: weight[:, :, :8], "weight must be"),
        (2, lambda weight: weight.double(), "takes float32"),
    ],
)
def test_the_ops_themselves_read_nothing_outside_their_tensors(place, change, message):
    arguments = [torch.zeros(8, 2, 64), torch.tensor([3, 5]), torch.zeros(2, 64, 16)]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastkd.lstm_forward(*arguments)


@fused
@pytest.mark.parametrize("place", [0, 3])
def test_the_gradient_reads_nothing_outside_its_tensors(place):
    arguments = [torch.zeros(8, 32), torch.tensor([3, 5]), torch.zeros(2, 64, 16), torch.zeros(8, 32)]
    arguments[place] = arguments[place][1:]
    with pytest.raises(RuntimeError, match=r"must be \(tokens, directions"):
        torch.ops.fastkd.lstm_backward(*arguments, torch.zeros(8, 2, 64))


def layer_and_inputs():
    torch.manual_seed(0)
    return BiLSTM(5, 16), torch.randn(4, 6, 5), torch.tensor([6, 2, 1, 4])


@fused
def test_the_students_layer_trains_by_the_kernels_as_by_torch():
    layer, x, lengths = layer_and_inputs()
    double = copy.deepcopy(layer).double()  # has no kernels
    plain = torch.nn.LSTM(5, 16, batch_first=True, bidirectional=True)
    state = dict(layer.forwards.named_parameters())
    plain.load_state_dict(state | {f"{name}_reverse": p for name, p in layer.backwards.named_parameters()})
    names = [*state, *(f"{name}_reverse" for name in state)]

    def by_torch(x, lengths):
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(plain(packed)[0], batch_first=True)[0]

    def results(function, parameters, dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        output = function(leaf, lengths)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return output.detach(), *torch.autograd.grad(output, [leaf, *parameters], grad)

    exact = results(double, double.parameters(), torch.float64)
    others = results(by_torch, [plain.get_parameter(name) for name in names], torch.float32)
    for got, *both in zip(results(layer, layer.parameters(), torch.float32), exact, others, strict=True):
        assert_close(got, *both, GRADIENT)


@fused
def test_what_stands_in_the_pads_goes_nowhere(monkeypatch):
    monkeypatch.delattr(torch.nn.LSTM, "forward")  # the kernels do without
    layer, x, lengths = layer_and_inputs()
    x[1, 2:] = torch.nan
    leaf = x.requires_grad_()
    output = layer(leaf, lengths)
    output.sum().backward()
    pads = torch.arange(6) >= lengths[:, None]
    assert output[pads].eq(0).all()
    assert leaf.grad[pads].eq(0).all()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())
