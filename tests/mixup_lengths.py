"""Run as a program under FASTKD_CPU_TARGET: every length around the vector widths, at every alignment, guarded."""

import mixup_samples as samples
import test_embedding_mixup
import test_mixup
import torch

GUARD = 42.0


def guarded(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Storage full of guards, and a view into it at an odd alignment that holds samples."""
    storage = torch.full(((rows + 1) * (columns + 1) + 8,), GUARD).to(dtype)
    view = storage[columns % 7 :][: rows * (columns + 1)].view(rows, columns + 1)[:, :columns]
    view.copy_(samples.examples((rows, columns), seed=columns))
    return storage, view


if __name__ == "__main__":
    for columns in (*range(1, 35), 47, 48, 49, 63, 64, 65, 127, 128, 129, 130, 145, 256, 257):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            storage, x = guarded(9, columns, dtype)
            before = storage.clone()
            test_mixup.check(x, samples.permutation(9), samples.lam(9))
            test_embedding_mixup.check(samples.ids((5, 4), 9), x)
            assert torch.equal(storage, before), "the inputs were written to"
