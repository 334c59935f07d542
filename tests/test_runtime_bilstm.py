"""The compiled layer against torch.nn.LSTM in float64, and what it promises its users."""

import os

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from fastkd.runtime import BiLSTM

# Above what was measured on these layers by a factor of about three; hidden states are below 1.
ERROR = {"float32": 1e-6, "bfloat16": 1e-3, "int8": 4e-2}
SIZES = {"odd": (22, 19), "one lane": (1, 1), "whole vectors": (64, 32), "wide": (300, 256)}
LENGTHS = {"one": [17], "one token": [1], "ragged": [3, 40, 1, 7, 7, 12, 25, 2, 1]}


def make_lstm(inputs, hidden):
    torch.manual_seed(0)
    return torch.nn.LSTM(inputs, hidden, bidirectional=True)


def make_layer(lstm, precision, threads=1):
    weights = {name: tensor.numpy() for name, tensor in lstm.state_dict().items()}
    return BiLSTM(weights, precision=precision, threads=threads)


def make_x(lengths, inputs):
    return np.random.default_rng(0).normal(size=(sum(lengths), inputs)).astype(np.float32)


@torch.inference_mode()
def in_float64(lstm, x, lengths):
    sequences = torch.from_numpy(x).double().split(list(lengths))
    states, _ = lstm.double()(pack_sequence(sequences, enforce_sorted=False))
    lstm.float()
    return torch.cat(unpack_sequence(states)).numpy()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("precision", ERROR)
def test_it_computes_what_torch_does(precision, sizes, lengths):
    lstm, x = make_lstm(*sizes), make_x(lengths, sizes[0])
    layer = make_layer(lstm, precision)
    assert (layer.input_size, layer.hidden_size, layer.precision) == (*sizes, precision)
    states = layer(x, lengths)
    assert states.dtype == np.float32
    np.testing.assert_allclose(states, in_float64(lstm, x, lengths), rtol=0, atol=ERROR[precision])


@pytest.mark.parametrize("precision", ERROR)
def test_a_sequence_gets_the_same_bits_in_any_company_and_on_any_threads(precision):
    lengths = np.random.default_rng(1).integers(1, 30, size=70)
    lstm, x = make_lstm(22, 19), make_x(lengths, 22)
    layer, begin = make_layer(lstm, precision), np.cumsum(lengths) - lengths
    together = layer(x, lengths)
    alone = [layer(x[b : b + n], [n]) for b, n in zip(begin, lengths, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    order = np.random.default_rng(2).permutation(len(lengths))
    shuffled = np.concatenate([x[begin[i] : begin[i] + lengths[i]] for i in order])
    np.testing.assert_array_equal(layer(shuffled, lengths[order]), np.concatenate([alone[i] for i in order]))
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(make_layer(lstm, precision, threads)(x, lengths), together)


def test_nothing_is_asked_nothing_answered():
    assert make_layer(make_lstm(4, 3), "int8")(np.zeros((0, 4), np.float32), []).shape == (0, 6)


def test_rows_may_lie_anywhere_in_memory():
    layer, x = make_layer(make_lstm(4, 3), "float32"), make_x([5], 8)
    np.testing.assert_array_equal(layer(x[:, ::2], [5]), layer(x[:, ::2].copy(), [5]))


def test_a_forked_child_has_threads_of_its_own():
    layer, x = make_layer(make_lstm(22, 19), "int8", threads=2), make_x([9, 4], 22)
    expected = layer(x, [9, 4])
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(layer(x, [9, 4]), expected) else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("x", "lengths", "error", "message"),
    [
        (np.zeros((2, 4)), [2], TypeError, "x must be float32, got float64"),
        (np.zeros((2, 4), np.float32), [2.0], TypeError, "lengths must be integers, got float64"),
        (np.zeros((2, 5), np.float32), [2], ValueError, r"x must be \(tokens, 4\), got shape \(2, 5\)"),
        (np.zeros(4, np.float32), [1], ValueError, r"x must be \(tokens, 4\)"),
        (np.full((2, 4), np.nan, np.float32), [2], ValueError, "x holds NaN or infinity"),
        (np.full((2, 4), -np.inf, np.float32), [2], ValueError, "x holds NaN or infinity"),
        (np.zeros((2, 4), np.float32), [1], ValueError, "lengths add up to 1, but there are 2 rows of x"),
        (np.zeros((2, 4), np.float32), [2, 0], ValueError, "lengths must be from 1 to the number of rows of x, got 0"),
    ],
)
def test_a_wrong_question_is_refused(x, lengths, error, message):
    with pytest.raises(error, match=message):
        make_layer(make_lstm(4, 3), "int8")(x, lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_ih_l0": None}, r"weight_ih_l0 must be \(4 hidden, inputs\), got nothing"),
        ({"weight_ih_l0": np.zeros((13, 4))}, r"weight_ih_l0 must be .* got shape \(13, 4\)"),
        ({"weight_hh_l0_reverse": None}, r"weight_hh_l0_reverse must be of shape \(12, 3\), got nothing"),
        (
            {"weight_ih_l0_reverse": np.zeros((12, 5))},
            r"weight_ih_l0_reverse must be of shape \(12, 4\), got \(12, 5\)",
        ),
        ({"bias_hh_l0": np.full(12, np.inf)}, "bias_hh_l0 holds NaN or infinity"),
        ({"weight_ih_l1": np.zeros((12, 6))}, "weight_ih_l1 belongs to no bidirectional LSTM of one layer"),
    ],
)
def test_wrong_weights_are_refused(change, message):
    weights = {name: tensor.numpy() for name, tensor in make_lstm(4, 3).state_dict().items()} | change
    with pytest.raises(ValueError, match=message):
        BiLSTM({name: array for name, array in weights.items() if array is not None})


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="precision must be float32, bfloat16 or int8, got int4"):
        make_layer(make_lstm(4, 3), "int4")
    with pytest.raises(ValueError, match="threads must be from 1 to 1024, got 0"):
        make_layer(make_lstm(4, 3), "int8", threads=0)
