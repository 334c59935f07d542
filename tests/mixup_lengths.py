"""Run as a program under FASTKD_CPU_TARGET: every length around the vector widths, at every alignment, guarded."""

import mixup_samples as samples
import test_embedding_mixup
import test_mixup
import torch
from backends import DTYPES

GUARD = 42.0


def check_between_guards(columns: int, dtype: torch.dtype) -> None:
    storage = torch.full((10 * (columns + 1) + 8,), GUARD).to(dtype)
    view = storage[columns % 7 :][: 9 * (columns + 1)].view(9, columns + 1)[:, :columns]
    view.copy_(samples.examples((9, columns), seed=columns))
    before = storage.clone()
    test_mixup.check("cpu", view)
    test_embedding_mixup.check("cpu", view, samples.ids((5, 4), 9))
    assert torch.equal(storage, before), "the inputs were written to"


if __name__ == "__main__":
    for columns in (*range(1, 35), 47, 48, 49, 63, 64, 65, 127, 128, 129, 130, 145, 256, 257):
        for dtype in DTYPES:
            check_between_guards(columns, dtype)
