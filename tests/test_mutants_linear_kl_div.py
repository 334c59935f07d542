"""Mutants of linear_kl_div, in the manner of ``test_mutants``: the tests must notice every one of them."""

import pytest

OP, HEADS, LOSS = "fastkd/ops/linear_kl_div.py", "fastkd/ops/_heads.py", "fastkd/losses/linear_kl_div.py"
MUTANTS = {
    "nothing": (HEADS, "FEW = 3", "FEW = 3"),
    "the reference forgets the scale": ("fastkd/reference/linear_kl_div.py", "logits = logits * scale", "pass"),
    "every part of a chunk meets the first of the teacher": (
        OP,
        "teacher.logits(part, ",
        "teacher.logits(slice(begin, begin + part.stop - first), ",
    ),
    "labels are those of the first chunk": (OP, "options.labels[rows]", "options.labels[: len(student)]"),
    "temperatures are not compacted": (
        OP,
        "row_temperature=counted(options.row_temperature)",
        "row_temperature=options.row_temperature",
    ),
    "masked rows are multiplied out": (OP, "options.valid.nonzero()", "(options.valid | True).nonzero()"),
    "the cap has no slope": (HEADS, "logits * capped, capped, value=-1", "logits * capped, capped, value=0"),
    "every chunk rounds the weight's gradient": (HEADS, "chunks > FEW", "chunks > 1e9"),
    "only the last chunk moves the weight": (HEADS, "if self.weight is None:", "if True:"),
    "the weight's gradient forgets the rows' weights": (
        HEADS,
        "(self.head.hidden[rows] * row_weight)",
        "self.head.hidden[rows]",
    ),
    "the hidden states' gradient forgets the scale": (HEADS, "row_weight = row_weight * head.scale", "pass"),
    "a chunk's bias replaces the last": (HEADS, "part if self.bias is None else self.bias.add_(part)", "part"),
    "float16 divides first": (HEADS, "if head.hidden.dtype == torch.float16 and", "if False and"),
    "the scaled loss leaves gradients as they are": (OP, "(grad * grad_loss).to", "grad.to"),
    "the memory budget is ignored": (OP, "(budget or _default_budget(weight))", "2**40"),
    "the common vocabulary is the whole": (LOSS, "x if x is None or len(x) == count else x[:count]", "x"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name, judge):
    judge(name, MUTANTS[name], "tests/test_linear_kl_div.py", chosen="not compiles")
