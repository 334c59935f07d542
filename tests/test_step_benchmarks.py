"""The trainers' steps that are measured compute what the same methods do when written plainly."""

import pytest
import torch

from benchmarks import makd_step, train_step, training_attention
from benchmarks.measure import WrongResult, bind, check
from benchmarks.registry import STEP, Case, Provider


@pytest.mark.parametrize(
    ("module", "method"),
    [
        *((train_step, method) for method in ("mixkd", "kd", "mkd", "mkd-cached")),
        (makd_step, makd_step.ALL),
        (makd_step, makd_step.LOSSES),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trainers_step_is_the_method_written_plainly(module, method):
    case = Case(module.BENCHMARK.op, (3, 8), torch.float32, "small", directions=(STEP,), options={"method": method})
    inputs = module.make_inputs(case)
    calls = {"fastkd": bind(module.BENCHMARK["fastkd"], case, inputs, STEP)}
    check(module.BENCHMARK, case, inputs, STEP, calls)
    calls["fastkd"] = lambda: (1.01 * module.trained(**inputs, method=method),)
    with pytest.raises(WrongResult):
        check(module.BENCHMARK, case, inputs, STEP, calls)


def test_attention_in_training_is_transformers_own():
    benchmark = training_attention.BENCHMARK
    case = Case(benchmark.op, (2, 3, 5, 8), torch.bfloat16, "small", directions=(STEP,))
    inputs = training_attention.make_inputs(case)
    calls = {name: bind(benchmark[name], case, inputs, STEP) for name in ("maps", "fastkd")}
    check(benchmark, case, inputs, STEP, calls)
    wrong = {
        "wrong": bind(Provider("wrong", lambda **tensors: 1.1 * training_attention.own(**tensors)), case, inputs, STEP)
    }
    with pytest.raises(WrongResult):
        check(benchmark, case, inputs, STEP, wrong)
