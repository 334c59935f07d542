"""The Triton kernel of kl_div against the float64 reference: interpreted without a GPU, and compiled for three."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import assert_close

from fastkd.losses import kl_div
from fastkd.ops import _extension
from fastkd.reference.kl_div import kl_div_rows, kl_div_stats

pytest.importorskip("triton")

from triton_compile import Job, compile_jobs

from fastkd.kernels import kl_div as kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on rows that the kernel then leaves out

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
NAN = float("nan")
DIVERGENCES = ("forward", "reverse", "jsd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL_TILE = kernel._Tile(rows=4, columns=16, num_warps=4, maxnreg=None)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and several rows to a program already at a few dozen columns, which the interpreter can afford."""
    monkeypatch.setattr(kernel, "_tile", lambda n_cols, divergence: SMALL_TILE)


@pytest.fixture(autouse=True)
def poisoned():
    """Fill fresh memory with NaN, so that nothing unwritten can pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def launch(student, teacher, divergence="forward", **options):
    defaults = {
        "temperature": 2.0,
        "row_temperature": None,
        "beta": 0.3,
        "valid": None,
        "labels": None,
        "cross_entropy_weight": 0.0,
        "scale_by_temperature": True,
        "grad_scale": None,
        "need_grad": True,
        "need_stats": True,
    }
    tensors = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in (defaults | options).items()
    }
    outputs = kernel.launch_kl_div(
        student.to(DEVICE), teacher.to(DEVICE), divergence=DIVERGENCES.index(divergence), **tensors
    )
    return tuple(output.cpu() for output in outputs)


def reference(student, teacher, divergence, options, dtype=None):
    """Rows, gradient and statistics in plain torch, in float64 or the dtype given."""
    student = student.detach().to(dtype or torch.float64).requires_grad_()
    teacher = teacher.to(dtype or torch.float64)
    temperature = options.get("row_temperature")
    shared = {
        "temperature": options.get("temperature", 2.0) if temperature is None else temperature,
        "valid": options.get("valid"),
        "labels": options.get("labels"),
    }
    rows = kl_div_rows(
        student,
        teacher,
        divergence=divergence,
        beta=options.get("beta", 0.3),
        cross_entropy_weight=options.get("cross_entropy_weight", 0.0),
        scale_by_temperature=options.get("scale_by_temperature", True),
        **shared,
    )
    scale = options.get("grad_scale")
    (grad,) = torch.autograd.grad(rows.sum() if scale is None else (rows * scale.to(rows.dtype)).sum(), student)
    return rows.detach(), grad, kl_div_stats(student.detach(), teacher, **shared)


def check(student, teacher, divergence, **options):
    actual = launch(student, teacher, divergence, **options)
    exact = reference(student, teacher, divergence, options)
    plain = reference(student, teacher, divergence, options, student.dtype)
    for name, *results in zip(("rows", "grad", "stats"), actual, exact, plain, strict=True):
        if name == "stats":
            for row in zip(*results, strict=True):
                assert_close(*row)
        else:
            assert_close(*results)


def samples(n_cols, dtype, seed=0):
    """Ordinary, peaked, flat, nearly equal, far-off and −inf-masked rows, in storage that is wider than the rows."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(2, 12, n_cols + 5, generator=generator)
    student, teacher = storage[0, :, :n_cols] * 3, storage[1, :, :n_cols] * 3
    student[1, 0] += 30
    teacher[1, -1] += 30
    student[2], teacher[2] = 0.25, -1.5
    teacher[3] = student[3] + 0.05 * storage[1, 3, :n_cols]
    student[4] += 500
    teacher[4] -= 500
    absent = torch.rand(n_cols, generator=generator) < 0.4
    absent[: min(16, n_cols - 1)] = True
    absent[-1] = False
    student[5, absent] = teacher[5, absent] = -INF
    student[6, 0] = -INF
    teacher[7, -1] = -INF
    student[8] = -INF
    teacher[9] = -INF
    student[10] = teacher[10] = -INF
    storage[0, :, :n_cols], storage[1, :, :n_cols] = student, teacher
    storage = storage.to(dtype)
    return storage[0, :, :n_cols], storage[1, :, :n_cols]


def everything(n_rows, n_cols):
    """Options that take every branch of the kernel at once; the label of row 5 never excludes the row."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(n_cols, (n_rows,), generator=generator)
    labels[5] = n_cols - 1
    labels[11] = -100
    return {
        "row_temperature": torch.rand(n_rows, generator=generator) * 3 + 0.5,
        "valid": torch.arange(n_rows) != 11,
        "labels": labels,
        "cross_entropy_weight": 0.7,
        "grad_scale": torch.tensor(0.125),
    }


@pytest.mark.parametrize("n_cols", [1, 3, 16, 17, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_reference(divergence, dtype, n_cols, small_tiles):
    check(*samples(n_cols, dtype), divergence, **everything(12, n_cols))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "scale_by_temperature": False},
        {"temperature": 1.0, "beta": 0.9, "labels": torch.arange(12) % 3},
        {"valid": torch.arange(12) % 3 == 0, "grad_scale": torch.tensor(4.0)},
        {"valid": torch.zeros(12, dtype=torch.bool)},
    ],
    ids=["default", "unscaled", "labels for statistics alone", "masked", "nothing valid"],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_reference_under_each_option(divergence, options, small_tiles):
    check(*samples(33, torch.float32), divergence, **options)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_reference_where_the_models_nearly_agree(divergence, temperature, small_tiles):
    generator = torch.Generator().manual_seed(3)
    student, noise = torch.randn(2, 8, 50, generator=generator)
    check(student * 3 + 20, student * 3 + 0.01 * noise, divergence, temperature=temperature)


@pytest.mark.parametrize("n_cols", [3, 1000, 4095, 4097])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_reference_in_the_tiles_of_real_vocabularies(divergence, n_cols):
    student, teacher = (logits[:6] for logits in samples(n_cols, torch.bfloat16))
    check(student, teacher, divergence, labels=torch.full((6,), n_cols - 1), cross_entropy_weight=0.5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_option_changes_the_result(divergence, small_tiles):
    student, teacher = (logits[:4] for logits in samples(17, torch.float32))
    base = launch(student, teacher, divergence, labels=torch.tensor([1, 2, 3, 4]))
    changes = {
        "temperature": 3.0,
        "row_temperature": torch.tensor([2.0, 2.0, 2.0, 2.5]),
        "valid": torch.tensor([True, True, True, False]),
        "cross_entropy_weight": 0.1,
        "scale_by_temperature": False,
    }
    if divergence == "jsd":
        changes["beta"] = 0.4
    for name, value in changes.items():
        rows, grad, _ = launch(student, teacher, divergence, labels=torch.tensor([1, 2, 3, 4]), **{name: value})
        assert not torch.equal(rows[3], base[0][3]), name
        assert not torch.equal(grad[3], base[1][3]), name
    rows, grad, _ = launch(student, teacher, divergence, grad_scale=torch.tensor(2.0))
    assert torch.equal(rows, base[0])
    assert torch.equal(grad, 2 * base[1])


def test_row_vectors_may_have_gaps(small_tiles):
    student, teacher = (logits[:6] for logits in samples(17, torch.float32))
    options = everything(12, 17) | {"valid": torch.arange(12) % 4 != 1}
    dense = {name: options[name][:6] for name in ("row_temperature", "valid", "labels")}
    gaps = {name: torch.stack((vector, vector.flip(0)), 1)[:, 0] for name, vector in dense.items()}
    assert all(vector.stride() == (2,) for vector in gaps.values())
    expected = launch(student, teacher, cross_entropy_weight=0.7, **dense)
    assert all(map(torch.equal, launch(student, teacher, cross_entropy_weight=0.7, **gaps), expected))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_column_absent_from_both_models_might_as_well_not_be_there(divergence, small_tiles):
    student, teacher = samples(40, torch.float32)
    rows, grad, stats = launch(student[:1, 20:].contiguous(), teacher[:1, 20:].contiguous(), divergence)
    student[:, :20] = teacher[:, :20] = -INF
    masked = launch(student[:1], teacher[:1], divergence)
    torch.testing.assert_close(masked[0], rows)
    torch.testing.assert_close(masked[1][:, 20:], grad)
    torch.testing.assert_close(masked[2], stats)
    assert masked[1][:, :20].eq(0).all()


def test_mass_on_a_column_the_other_model_lacks_is_infinite_even_if_it_underflows(small_tiles):
    lacking, full = torch.zeros(1, 20), torch.zeros(1, 20)
    lacking[0, 3], full[0, 3] = -INF, -1e4
    for divergence, student, teacher in (("forward", lacking, full), ("reverse", full, lacking)):
        rows, grad, stats = launch(student, teacher, divergence)
        assert rows.tolist() == [INF]
        assert grad.eq(0).all()
        assert stats.isfinite().all()
        other = "reverse" if divergence == "forward" else "forward"
        for finite in (other, "jsd"):
            rows, grad, _ = launch(student, teacher, finite)
            assert rows.isfinite().all()
            assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_loss_and_no_gradient(divergence, small_tiles):
    student, _ = samples(50, torch.float32)
    rows, grad, stats = launch(student, student.clone(), divergence)
    assert rows.eq(0).all()
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)
    assert torch.equal(stats[1], stats[2])
    assert stats[3, :8].eq(1).all()


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_nan_stays_in_its_row(divergence, which, small_tiles):
    student, teacher = samples(33, torch.float32)
    clean = launch(student, teacher, divergence)
    (student if which == "student" else teacher)[2, 20] = NAN
    rows, grad, stats = launch(student, teacher, divergence)
    others = torch.arange(12) != 2
    assert rows[2].isnan()
    assert grad[2].isnan().all()
    assert torch.equal(rows[others], clean[0][others])
    assert torch.equal(grad[others], clean[1][others])
    assert torch.equal(stats[:, others], clean[2][:, others])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_of_nan_and_absent_columns_is_not_empty(divergence, small_tiles):
    student = torch.full((1, 20), -INF)
    student[0, 4] = NAN
    rows, grad, _ = launch(student, student.clone(), divergence)
    assert rows.isnan().all()
    assert grad.isnan().all()


@pytest.mark.parametrize("label", [-1, 20, 2**40])
def test_a_label_outside_the_vocabulary_makes_its_row_nan(label, small_tiles):
    student, teacher = (logits[:4] for logits in samples(20, torch.float32))
    rows, grad, _ = launch(student, teacher, labels=torch.tensor([1, label, 3, 19]), cross_entropy_weight=1.0)
    assert rows.isnan().tolist() == [False, True, False, False]
    assert grad.isnan().all(1).tolist() == [False, True, False, False]
    assert grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_finite_logits_have_finite_losses_and_gradients(divergence, size, temperature, small_tiles):
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 4, 20, generator=generator) * size
    outputs = launch(student, teacher, divergence, temperature=temperature)
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_columns_masked_by_the_lowest_finite_number(divergence, dtype, temperature, small_tiles):
    student, teacher = (logits[:3].contiguous() for logits in samples(33, dtype))
    student[0, :20] = teacher[0, :20] = torch.finfo(dtype).min
    student[1, 16], teacher[2, 16] = torch.finfo(dtype).min, torch.finfo(dtype).min
    rows, grad, stats = launch(student, teacher, divergence, temperature=temperature)
    assert not rows.isnan().any()
    assert grad.isfinite().all()
    assert stats.isfinite().all()
    student[0, :20] = teacher[0, :20] = -INF
    absent = launch(student, teacher, divergence, temperature=temperature)
    assert torch.equal(rows[0], absent[0][0])
    assert torch.equal(grad[0], absent[1][0])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_not_needed_is_not_made_and_changes_nothing(divergence, small_tiles):
    student, teacher = samples(33, torch.float32)
    rows, grad, stats = launch(student, teacher, divergence)
    alone = launch(student, teacher, divergence, need_grad=False, need_stats=False)
    assert [output.numel() for output in alone] == [12, 0, 0]
    assert torch.equal(alone[0], rows)
    assert torch.equal(launch(student, teacher, divergence, need_stats=False)[1], grad)
    assert torch.equal(launch(student, teacher, divergence, need_grad=False)[2], stats)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_gives_the_same_bits_again_and_in_any_batch(divergence, small_tiles):
    student, teacher = samples(33, torch.bfloat16)
    together = launch(student, teacher, divergence)
    assert all(map(torch.equal, together, launch(student, teacher, divergence)))
    for row in (0, 5, 7):
        alone = launch(student[row : row + 1], teacher[row : row + 1], divergence)
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])
        assert torch.equal(alone[2][:, 0], together[2][:, row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_op_reduces_as_the_reference_does(reduction, dtype, monkeypatch, small_tiles):
    """All the way from the public loss, with the kernel in the place it has on a GPU."""
    student, teacher = (logits[:4].contiguous() for logits in samples(33, dtype))
    options = {"temperature": 1.5, "mask": torch.tensor([True, False, True, True]), "reduction": reduction}
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]) if reduction == "none" else torch.tensor(3.0)

    def evaluate(dtype):
        leaf = student.to(DEVICE, dtype).requires_grad_()
        moved = options | {"mask": options["mask"].to(DEVICE)}
        loss = kl_div(leaf, teacher.to(DEVICE, dtype), **moved)
        (grad,) = torch.autograd.grad(loss, leaf, weights.to(DEVICE, loss.dtype))
        return loss.detach().cpu(), grad.cpu()

    exact = evaluate(torch.float64)
    monkeypatch.setattr(_extension, "backend", lambda *_: "reference")
    plain = evaluate(dtype)
    monkeypatch.setattr(_extension, "backend", lambda *_: "triton")
    monkeypatch.setattr(torch.ops.fastkd, "kl_div", sys.modules["fastkd.ops.kl_div"]._triton)
    for result in zip(evaluate(dtype), exact, plain, strict=True):
        assert_close(*result)


def test_no_rows():
    rows, grad, stats = launch(torch.empty(0, 7), torch.empty(0, 7))
    assert (rows.shape, grad.shape, stats.shape) == ((0,), (0, 7), (4, 0))


FAR_ROWS = """
import torch
from fastkd.kernels.kl_div import launch_kl_div

logits = torch.empty_strided((33, 64), (2**26, 1), dtype=torch.float16)
logits.copy_(torch.randn(33, 64))

def run(logits):
    return launch_kl_div(
        logits[:, :32], logits[:, 32:], temperature=2.0, row_temperature=None, divergence=0, beta=0.5, valid=None,
        labels=None, cross_entropy_weight=0.0, scale_by_temperature=True, grad_scale=None, need_grad=True,
        need_stats=True,
    )

for far, near in zip(run(logits), run(logits.contiguous())):
    assert torch.equal(far, near)
"""


def test_offsets_beyond_two_to_the_31():
    """Rows 2²⁶ elements apart, in memory that is promised and hardly touched: an int32 offset would leave it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAR_ROWS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_program_id_is_widened_before_it_becomes_an_offset():
    for path in ROOT.joinpath("kernels").glob("*.py"):
        source = path.read_text()
        narrow = re.findall(r"tl\.program_id\([^)]*\)(?!\.to\(tl\.int64\))", source)
        assert not narrow, f"{path.name}: {narrow}"


ARGUMENTS = {
    "rows_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "row_temperature_ptr": "*fp32",
    "valid_ptr": "*i1",
    "labels_ptr": "*i64",
    "grad_scale_ptr": "*fp32",
    "student_stride": "i32",
    "teacher_stride": "i32",
    "n_rows": "i32",
    "n_cols": "i32",
    "temperature": "fp32",
    "beta": "fp32",
    "cross_entropy_weight": "fp32",
    "DIVERGENCE": "constexpr",
    "SCALE_BY_TEMPERATURE": "constexpr",
    "CROSS_ENTROPY": "constexpr",
    "ROWS": "constexpr",
    "BLOCK": "constexpr",
}
EVERYTHING = ()
GRADIENT = ("stats_ptr", "row_temperature_ptr", "valid_ptr", "labels_ptr")
LOSS = (*GRADIENT, "grad_ptr", "grad_scale_ptr")


def compile_job(capability, divergence, logits, n_cols, without):
    """The launch at ``n_cols`` columns, without some of the kernel's optional tensors."""
    index = DIVERGENCES.index(divergence)
    tile = kernel._tile(n_cols, index)
    constexprs = {
        "DIVERGENCE": index,
        "SCALE_BY_TEMPERATURE": True,
        "CROSS_ENTROPY": "labels_ptr" not in without,
        "ROWS": tile.rows,
        "BLOCK": tile.columns,
    }
    constexprs |= dict.fromkeys(without)
    if n_cols == 1:
        constexprs["n_cols"] = 1
    tensors = dict.fromkeys(("student_ptr", "teacher_ptr"), f"*{logits}")
    signature = {**tensors, "rows_ptr": "*fp32", "grad_ptr": f"*{logits}", **ARGUMENTS}
    names = [name for name in signature if name.endswith("_ptr") and name not in constexprs]
    aligned = [*names, *(("n_cols", "student_stride", "teacher_stride") if n_cols % 16 == 0 else ())]
    options = {"num_warps": tile.num_warps, "maxnreg": tile.maxnreg}
    return Job("fastkd.kernels.kl_div:_kl_div_kernel", signature, constexprs, aligned, options, capability)


def assert_nothing_spills(cases):
    resources = compile_jobs([compile_job(*case) for case in cases])
    report = "\n".join(f"{case}: {found}" for case, found in zip(cases, resources, strict=True))
    print(report)
    assert all(found.stack == 0 for found in resources), report


def test_compiles_without_spills():
    """The widest tile, with everything in it, of each divergence on each generation, and a few of the others."""
    widest = [(capability, name, "fp32", 32768, EVERYTHING) for capability in (80, 90, 100) for name in DIVERGENCES]
    others = [
        (90, "forward", "bf16", 128256, GRADIENT),
        (90, "reverse", "bf16", 1, EVERYTHING),
        (90, "jsd", "fp16", 30522, LOSS),
        (100, "jsd", "bf16", 3, EVERYTHING),
    ]
    assert_nothing_spills(widest + others)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills_in_every_variant(capability):
    assert_nothing_spills(
        [
            (capability, divergence, logits, n_cols, without)
            for divergence in DIVERGENCES
            for logits in ("fp32", "bf16")
            for n_cols in (3, 128, 2000, 32768, 128257)
            for without in (EVERYTHING, GRADIENT, LOSS)
        ]
    )
