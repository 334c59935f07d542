"""The trainers' steps that are measured compute what the same methods do when written plainly."""

import pytest
import torch

from benchmarks import makd_step, train_step, training_attention, training_bilstm
from benchmarks.measure import bind, faults
from benchmarks.registry import STEP, Case, Provider


@pytest.mark.parametrize(
    ("module", "method"),
    [
        *((train_step, method) for method in ("mixkd", "kd", "mkd", "mkd-cached")),
        pytest.param(makd_step, makd_step.ALL, marks=pytest.mark.slow),
        (makd_step, makd_step.LOSSES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trainers_step_is_the_method_written_plainly(module, method):
    case = Case(module.BENCHMARK.op, (3, 8), torch.float32, "small", directions=(STEP,), options={"method": method})
    inputs = module.make_inputs(case)
    calls = {"fastkd": bind(module.BENCHMARK["fastkd"], case, inputs, STEP)}
    assert not faults(module.BENCHMARK, case, inputs, STEP, calls)
    calls["fastkd"] = lambda: (1.01 * module.trained(**inputs, method=method),)
    assert "fastkd" in faults(module.BENCHMARK, case, inputs, STEP, calls)


@pytest.mark.parametrize(
    ("module", "shape", "peers"),
    [(training_attention, (2, 3, 5, 8), ("maps", "fastkd")), (training_bilstm, (3, 6, 8, 16), ("fastkd",))],
)
def test_a_part_of_a_step_is_torchs_own(module, shape, peers):
    benchmark = module.BENCHMARK
    case = Case(benchmark.op, shape, torch.bfloat16, "small", directions=(STEP,))
    inputs = module.make_inputs(case)
    calls = {name: bind(benchmark[name], case, inputs, STEP) for name in peers}
    assert not faults(benchmark, case, inputs, STEP, calls)
    wrong = bind(Provider("wrong", lambda **tensors: 1.1 * module.own(**tensors)), case, inputs, STEP)
    assert "wrong" in faults(benchmark, case, inputs, STEP, {"wrong": wrong})
