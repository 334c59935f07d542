"""torch's own int8, as the benchmarks of answers ask it."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn


def torch_int8(model: nn.Module) -> nn.Module:
    """Dynamic quantization of the LSTM and linear layers inside, by the engine that torch chooses for this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation: torch has nothing else for an LSTM
        kinds = {nn.LSTM, nn.Linear}
        quantized: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), kinds, torch.qint8)
    return quantized
