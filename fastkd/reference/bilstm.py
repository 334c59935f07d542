"""A BiLSTM layer over ragged sequences in plain torch: the definition every kernel is held to."""

import torch
from torch import Tensor


def bilstm(x: Tensor, lengths: Tensor, weight_input: Tensor, weight_recurrent: Tensor, bias: Tensor) -> Tensor:
    """Shapes as in :func:`fastkd.ops.bilstm`; float64 arithmetic for float64 ``x``, else float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    begins = lengths.cumsum(0) - lengths
    steps = max(int(lengths.max()), 1) if lengths.numel() else 1  # one even for nobody: it ties the states to the graph
    outputs = []
    for way, (of_input, recurrent, shift) in enumerate(
        zip(weight_input.to(wide), weight_recurrent.to(wide), bias.to(wide), strict=True)
    ):
        gates = x.to(wide) @ of_input.T + shift
        states = gates.new_zeros(x.shape[0], recurrent.shape[1])
        h, c = gates.new_zeros(2, len(lengths), recurrent.shape[1]).unbind()
        for step in range(steps):
            running = (lengths > step).nonzero()[:, 0]
            tokens = begins[running] + (lengths[running] - 1 - step if way == 1 else step)
            i, f, g, o = (gates[tokens] + h[running] @ recurrent.T).chunk(4, -1)
            c = c.index_put((running,), f.sigmoid() * c[running] + i.sigmoid() * g.tanh())
            h = h.index_put((running,), o.sigmoid() * c[running].tanh())
            states = states.index_put((tokens,), h[running])
        outputs.append(states)
    return torch.cat(outputs, -1).to(x.dtype)
