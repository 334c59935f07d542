"""Run as a program under FASTKD_CPU_TARGET: every length around the vector widths, at every alignment, guarded."""

import torch
from backends import DTYPES, check
from kl_div_samples import DIVERGENCES

from fastkd.losses import kl_div

GUARD = 42.0


def check_between_guards(vocabulary: int, offset: int, dtype: torch.dtype, divergence: str) -> None:
    storage = torch.full((2, 40 * (vocabulary + 3)), GUARD).to(dtype)
    generator = torch.Generator().manual_seed(vocabulary)
    views = []
    for buffer in storage:
        view = buffer[offset : offset + 18 * (vocabulary + 1)].view(18, vocabulary + 1)[:, :vocabulary]
        view.copy_(3 * torch.randn(18, vocabulary, generator=generator))
        views.append(view)
    before = storage.clone()
    check("kl_div", "cpu", kl_div, *views, temperature=1.5, divergence=divergence, reduction="none")
    assert torch.equal(storage, before), "the inputs were written to"


if __name__ == "__main__":
    for vocabulary in (*range(1, 19), 31, 32, 33, 47, 48, 49, 63, 64, 65, 255, 256, 257, 258, 1023, 1025, 1040):
        for dtype in DTYPES:
            check_between_guards(vocabulary, vocabulary % 7, dtype, DIVERGENCES[vocabulary % 3])
        check_between_guards(vocabulary, 0, torch.float32, "forward")
