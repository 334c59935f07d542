"""The recurrent kernel on a GPU, against torch.nn.LSTM in float64."""

import pytest
import torch
from torch import nn

from fastkd.ops import _extension

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("fastkd._C_cuda" in _extension.problems, reason="fastkd._C_cuda is not built"),
]

BOUND = {torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""The state of each step is rounded to the dtype, eight units of which are allowed in the end."""


def problem(hidden, lengths, dtype, directions=2):
    generator = torch.Generator().manual_seed(hidden)
    gates = torch.randn(sum(lengths), directions, 4 * hidden, generator=generator)
    weight = torch.randn(directions, 4 * hidden, hidden, generator=generator) / hidden**0.5
    return gates.cuda().to(dtype), torch.tensor(lengths, device="cuda"), weight.cuda().to(dtype)


def reference(gates, lengths, weight):
    """torch.nn.LSTM in float64, one sequence at a time; the identity as its input's weights hands the gates through."""
    _, directions, rows = gates.shape
    out = torch.empty(len(gates), directions, rows // 4, dtype=torch.float64)
    for direction in range(directions):
        lstm = nn.LSTM(rows, rows // 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            lstm.weight_ih_l0.copy_(torch.eye(rows))
            lstm.weight_hh_l0.copy_(weight[direction])
            sequences = gates[:, direction].double().cpu().split(lengths.tolist())
            targets = out[:, direction].split(lengths.tolist())
            for sequence, target in zip(sequences, targets, strict=True):
                if len(sequence):
                    order = slice(None) if direction == 0 else torch.arange(len(sequence) - 1, -1, -1)
                    target[order] = lstm(sequence[order])[0]
    return out.flatten(1)


MIXED = [5, 0, 1, 12, 3, 3, 9, 2, 1, 7, 4]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("hidden", "lengths"),
    [
        (8, [1]),
        (16, MIXED),
        (64, [3] * 256),
        (136, MIXED * 3),
        (256, [24]),
        (256, MIXED * 24),  # more tiles than groups
        (320, MIXED),
        (512, MIXED * 4),
        (768, [8, 2]),
        (1024, [6] * 5),
        (1024, MIXED * 12),
        (32, [0, 0]),
        (32, []),
    ],
)
def test_against_float64(hidden, lengths, dtype):
    arguments = problem(hidden, lengths, dtype)
    out = torch.ops.fastkd.lstm_steps(*arguments)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double().cpu(), reference(*arguments), atol=BOUND[dtype], rtol=0)


def test_one_direction():
    arguments = problem(64, MIXED, torch.float16, directions=1)
    out = torch.ops.fastkd.lstm_steps(*arguments)
    torch.testing.assert_close(out.double().cpu(), reference(*arguments), atol=BOUND[torch.float16], rtol=0)


@pytest.mark.parametrize("hidden", [128, 256, 512, 1024])
def test_the_same_bits_again_and_alone(hidden):
    gates, lengths, weight = problem(hidden, MIXED * 20, torch.bfloat16)
    out = torch.ops.fastkd.lstm_steps(gates, lengths, weight)
    for _ in range(20):
        assert torch.equal(torch.ops.fastkd.lstm_steps(gates, lengths, weight), out)
    alone = torch.ops.fastkd.lstm_steps(gates[:5], lengths[:1], weight)
    assert torch.equal(alone, out[:5])


@pytest.mark.parametrize("hidden", [256, 1024])
def test_in_a_cuda_graph(hidden):
    gates, lengths, weight = problem(hidden, MIXED, torch.float16)
    torch.ops.fastkd.lstm_steps(gates, lengths, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.fastkd.lstm_steps(gates, lengths, weight)
    gates.neg_()
    lengths.copy_(lengths.flip(0))
    graph.replay()
    torch.testing.assert_close(out.double().cpu(), reference(gates, lengths, weight), atol=BOUND[torch.float16], rtol=0)


def test_lengths_that_do_not_fit_touch_nothing_else():
    gates, _, weight = problem(64, [7], torch.float16)
    lengths = torch.tensor([-3, 5, 2**62, 4], device="cuda")
    out = torch.ops.fastkd.lstm_steps(gates, lengths, weight)
    expected = reference(gates, torch.tensor([5, 2]), weight)
    torch.testing.assert_close(out.double().cpu(), expected, atol=BOUND[torch.float16], rtol=0)


def test_any_stride_and_beginning():
    gates, lengths, weight = problem(16, MIXED, torch.float16)
    expected = torch.ops.fastkd.lstm_steps(gates, lengths, weight)
    more = torch.cat((lengths[:1], lengths))
    shifted = weight.new_empty(weight.numel() + 1)[1:].view_as(weight).copy_(weight)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (gates, weight)]
    for arguments in ((gates, more[1:], shifted), (strided[0], lengths.repeat_interleave(2)[::2], strided[1])):
        assert torch.equal(torch.ops.fastkd.lstm_steps(*arguments), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, n, w: (g.float(), n, w), "gates must have weight's dtype"),
        (lambda g, n, w: (g, n.int(), w), "lengths must be"),
        (lambda g, n, w: (g, n, w.float()), "weight must be bfloat16 or float16"),
        (lambda g, n, w: (g[:, :1], n, w), "gates must be"),
        (lambda g, n, w: (g, n.cpu(), w), "one GPU"),
        (lambda g, n, w: (g[..., :48].contiguous(), n, w[:, :48, :12].contiguous()), "multiple of 8"),
    ],
)
def test_what_the_op_refuses(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastkd.lstm_steps(*change(*problem(16, MIXED, torch.float16)))
