"""Run by torchrun: the gradients that DistributedDataParallel leaves are those of the whole batch in one process."""

import interplay_samples as samples
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


def check(name: str, rank: int, world: int) -> None:
    whole = samples.batch(8)
    share = whole.part(slice(rank * 8 // world, (rank + 1) * 8 // world))
    alone, student = samples.Student(name), samples.Student(name)
    parallel = DistributedDataParallel(student)
    alone(whole).backward()
    parallel(share, normalizer=whole.mask.sum() / world).backward()  # gradients are averaged over processes, not summed
    for got, want in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=lambda message: f"{name}: {message}")


distributed.init_process_group("gloo")
for name in samples.LOSSES:
    check(name, distributed.get_rank(), distributed.get_world_size())
distributed.barrier()  # else a process may end under the other's last messages, which aborts it
distributed.destroy_process_group()
