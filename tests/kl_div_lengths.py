"""Run as a program under FASTKD_CPU_TARGET: every length around the vector widths, at every alignment, guarded."""

import torch
from test_kl_div import plain
from tolerance import GRADIENT, assert_close

from fastkd.losses import kl_div

GUARD = 42.0


def check(vocabulary: int, offset: int, dtype: torch.dtype, divergence: str) -> None:
    storage = torch.full((2, 40 * (vocabulary + 3)), GUARD).to(dtype)
    generator = torch.Generator().manual_seed(vocabulary)
    views = []
    for buffer in storage:
        view = buffer[offset : offset + 18 * (vocabulary + 1)].view(18, vocabulary + 1)[:, :vocabulary]
        view.copy_(3 * torch.randn(18, vocabulary, generator=generator))
        views.append(view)
    student, teacher = views
    options = {"temperature": 1.5, "divergence": divergence, "reduction": "none"}
    before = storage.clone()
    leaf = student.detach().requires_grad_()
    loss = kl_div(leaf, teacher, **options)
    weights = torch.linspace(0.5, 1.5, 18)
    (grad,) = torch.autograd.grad((loss * weights).sum(), leaf)
    wide = student.double().requires_grad_()
    exact = kl_div(wide, teacher.double(), **options)
    (exact_grad,) = torch.autograd.grad((exact * weights).sum(), wide)
    plain_loss, plain_grad = plain(student, teacher, **options)
    assert torch.equal(storage, before), "the inputs were written to"
    assert_close(loss.detach(), exact.detach(), plain_loss)
    assert_close(grad, exact_grad, plain_grad, GRADIENT)


if __name__ == "__main__":
    for vocabulary in (*range(1, 19), 31, 32, 33, 47, 48, 49, 63, 64, 65, 255, 256, 257, 258, 1023, 1025, 1040):
        divergence = ("forward", "reverse", "jsd")[vocabulary % 3]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(vocabulary, vocabulary % 7, dtype, divergence)
        check(vocabulary, 0, torch.float32, "forward")
