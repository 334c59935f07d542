"""Every op under what a training loop uses of torch: autocast, accumulation, compilation, checkpoints, DDP."""

from contextlib import ExitStack
from itertools import product

import interplay_samples as samples
import pytest
import torch
from backends import HAS_GPU, answering, check, device_of, fused
from subprocesses import python
from torch.utils.checkpoint import checkpoint

from fastkd import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SLOW = () if HAS_GPU else ("attention_kl_div", "attention_kl_div by row")
"""What Triton's interpreter has no time for."""


def every_op_with(*marks_of_triton):
    triton = [pytest.param("triton", name, marks=marks_of_triton) for name in samples.LOSSES if name not in SLOW]
    cases = [*product(["cpu"], samples.LOSSES), *triton]
    return pytest.mark.parametrize(("backend", "name"), cases, indirect=["backend"])


every_op = every_op_with()


@pytest.fixture
def backend(request):
    """The backend that answers all ops."""
    with ExitStack() as stack:
        for op in {name.split()[0] for name in samples.LOSSES}:
            stack.enter_context(answering(op, request.param))
        yield request.param


@pytest.fixture
def device(backend):
    return device_of(backend)


def gradients(loss, student):
    return loss.detach(), *torch.autograd.grad(loss, tuple(student.parameters()))


def test_every_op_is_here():
    assert {name.split()[0] for name in samples.LOSSES} == set(ops.__all__) - {"bilstm"}  # which has no gradient


@every_op
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_computes_what_the_dtypes_say(device, name, teacher_dtype):
    student, batch = samples.Student(name, device), samples.batch(8, device=device)
    batch = batch._replace(teacher=batch.teacher.to(teacher_dtype))
    with torch.autocast(device, dtype=torch.bfloat16):
        hidden = student.layer(batch.x)
        inside = gradients(student.loss(hidden, student.weight, batch), student)
        hidden = student.layer(batch.x)
    cast = samples.AUTOCAST_CASTS.get(name.split()[0], ("weight",))
    weight = student.weight.bfloat16() if "weight" in cast else student.weight
    if "teacher" in cast:
        batch = batch._replace(teacher=batch.teacher.bfloat16())
    outside = gradients(student.loss(hidden, weight, batch), student)
    assert hidden.dtype == torch.bfloat16
    for got, want in zip(inside, outside, strict=True):
        assert got.dtype == torch.float32
        assert got.any()
        assert torch.equal(got, want)


@every_op
def test_accumulated_micro_batches_are_the_whole_batch(device, name):
    student, batch = samples.Student(name, device), samples.batch(8, device=device)
    loss, *grads = gradients(student(batch), student)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 6), slice(6, 8)):
        part = student(batch.part(rows), normalizer=batch.mask.sum())
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, loss)
    for parameter, want in zip(student.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, want)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_normalizer_below_1_divides_loss_and_gradients(backend, name, dtype):
    def loss(hidden, weight, *batch, **options):
        return samples.LOSSES[name](hidden, weight, samples.Batch(*batch), **options)

    student, batch = samples.Student(name), samples.batch(8)
    tensors = (batch.x, student.weight, batch.x, batch.ids, batch.teacher, batch.mask, batch.lam)
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    check(name.split()[0], backend, loss, *tensors, wanted=(0, 1), normalizer=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in samples.LOSSES if "by row" not in name])
def test_a_normalizer_of_0_gives_0(name, dtype):
    student, batch = samples.Student(name).to(dtype), samples.batch(8)
    batch = batch._replace(x=batch.x.to(dtype), teacher=batch.teacher.to(dtype))
    results = gradients(student(batch, normalizer=torch.tensor(0.0)), student)
    assert not any(result.any() for result in results)


@every_op_with(pytest.mark.slow)  # in the interpreter, of an op that the compiler sees as it sees the CPU's
def test_compiles_into_one_graph_once_for_all_batch_sizes(device, name):
    student = samples.Student(name, device)
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 8, 22):
        batch = samples.batch(count, tokens=count + 1, device=device)
        with torch.compiler.set_stance("default" if count == 4 else "fail_on_recompile"):
            fast = gradients(compiled(batch), student)
        for got, want in zip(fast, gradients(student(batch), student), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    torch.compiler.reset()


@every_op
def test_a_checkpoint_changes_no_bit(device, name):
    student, batch = samples.Student(name, device), samples.batch(8, device=device)
    plain = gradients(student(batch), student)
    again = gradients(checkpoint(student, batch, use_reentrant=False), student)
    assert all(map(torch.equal, again, plain))


@fused
def test_data_parallel_gradients_are_those_of_one_process():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    python(*launcher, "tests/interplay_data_parallel.py", GLOO_SOCKET_IFNAME="lo")
