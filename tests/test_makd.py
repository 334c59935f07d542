"""MaKD: the loss against its formula, its levels, refusals."""

import copy

import pytest
import torch
from families import DECODERS, FAMILIES, IDS, MASK, make
from torch.nn import functional as F

from fastkd.methods.feature_distillation import map_weights
from fastkd.methods.makd import MaKDObjective, is_attention
from fastkd.methods.objective import IGNORED
from fastkd.students import factorize, plan_factorization
from fastkd.training.taps import Features, Taps

LABELS = torch.tensor([0, 1])
NEXT_TOKENS = IDS.roll(-1, 1).masked_fill(MASK.roll(-1, 1) == 0, IGNORED)
PARTS = ("attention", "hidden", "mha", "ffn", "logits", "labels")


def features_of(model):
    taps = Taps(model, maps=True)
    with taps.record() as features:
        output = model(input_ids=IDS, attention_mask=MASK)
    features.logits, features.weights = output.logits, map_weights(model)
    taps.close()
    return features


def pair(name="bert"):
    teacher = make(name).requires_grad_(False)
    student = factorize(teacher, plan_factorization(teacher, rank=6))
    return student, teacher


def formulas(student, teacher, form, labels=LABELS):
    """The parts, plainly, in float64."""
    valid = MASK.bool()
    tokens = valid.sum()

    def error(mine, theirs):
        squares = (mine.double() - theirs.double()).square().view(2, 12, -1)  # OPT's maps flatten the tokens
        return squares[valid].sum() / tokens / mine.shape[-1]

    def maps(attention):
        keys = attention.key.double().repeat_interleave(4 // attention.key.shape[1], dim=1)
        scores = attention.query.double() @ keys.mT * attention.scale
        back = torch.arange(12)[:, None] - torch.arange(12)
        if attention.window is not None:
            scores = scores.masked_fill(back.abs() >= attention.window, -torch.inf)
        if len(labels.shape) > 1:
            scores = scores.masked_fill(back < 0, -torch.inf)
        return scores.masked_fill(~valid[:, None, None], -torch.inf).log_softmax(-1)

    kls = []
    for mine, theirs in zip(student.attention, teacher.attention, strict=True):
        p, q = maps(theirs), maps(mine)
        rows = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
        kls.append(rows.mean(1)[valid].sum() / tokens)
    matrices = {"mha": 0.0, "ffn": 0.0}
    for name in student.outputs:
        part = "mha" if "att" in name else "ffn"
        if form == "output":
            matrices[part] += error(student.outputs[name], teacher.outputs[name]) / 3
        else:
            difference = student.weights[name].double() - teacher.weights[name].double()
            matrices[part] += difference.square().mean() / 3
    answered = [model.logits.double()[labels != IGNORED] for model in (teacher, student)]
    p, q = ((logits / 2).log_softmax(-1) for logits in answered)
    return {
        "attention": sum(kls) / 3,
        "hidden": sum(error(*states) for states in zip(student.hidden, teacher.hidden, strict=True)) / 4,
        **matrices,
        "logits": 4 * (p.exp() * (p - q)).sum(-1).mean(),
        "labels": F.cross_entropy(answered[1], labels[labels != IGNORED]),
    }


WEIGHTS = dict(zip((f"{part}_weight" for part in PARTS), (1.0, 2.0, 0.5, 0.25, 3.0, 0.1), strict=True))


@pytest.mark.parametrize("form", ["output", "weight"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_its_formula(name, form):
    student, teacher = map(features_of, pair(name))
    objective = MaKDObjective(**WEIGHTS, temperature=2.0, matrix_form=form)
    labels = NEXT_TOKENS if name in DECODERS else LABELS
    total, parts = objective(student, teacher, labels, MASK)
    want = formulas(student, teacher, form, labels)
    assert parts.keys() == want.keys()
    for part, value in want.items():
        torch.testing.assert_close(parts[part].double(), value, rtol=1e-4, atol=1e-6, msg=part)
    weighted = sum(WEIGHTS[f"{part}_weight"] * value for part, value in want.items())
    torch.testing.assert_close(total.double(), weighted, rtol=1e-4, atol=1e-6)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("form", ["output", "weight"])
def test_the_gradient_is_the_formulas(form):
    student, teacher = pair()
    mine, theirs = features_of(student), features_of(teacher)
    total, _ = MaKDObjective(**WEIGHTS, temperature=2.0, matrix_form=form)(mine, theirs, LABELS, MASK)
    want = sum(WEIGHTS[f"{part}_weight"] * value for part, value in formulas(mine, theirs, form).items())
    for got, expected in zip(gradients(student, total), gradients(student, want), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["output", "weight"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_passes_gradcheck(part, form):
    student, teacher = (model.double() for model in pair())
    theirs = features_of(teacher)
    objective = MaKDObjective(**{f"{other}_weight": float(other == part) for other in PARTS}, matrix_form=form)
    names = ("bert.encoder.layer.1.attention.self.query.down", "bert.encoder.layer.0.output.dense.up")
    tensors = [student.get_parameter(name).detach().clone().requires_grad_() for name in names]
    taps = Taps(student, maps=True)

    def loss(*values):
        parameters = dict(zip(names, values, strict=True))
        with taps.record() as mine:
            mine.logits = torch.func.functional_call(student, parameters, (IDS, MASK)).logits
        whole = {name: student.get_submodule(f"bert.encoder.layer.{name}") for name in mine.outputs}
        mine.weights = {name: module.weight for name, module in whole.items()}
        for name, value in parameters.items():
            _, _, path = name.partition("layer.")
            factors = {"up": whole[path.rpartition(".")[0]].up, "down": whole[path.rpartition(".")[0]].down}
            factors[name.rpartition(".")[2]] = value
            mine.weights[path.rpartition(".")[0]] = factors["up"] @ factors["down"]
        return objective(mine, theirs, LABELS, MASK)[0]

    assert torch.autograd.gradcheck(loss, tensors, fast_mode=True)


def test_pads_and_what_they_hold_are_left_out():
    student, teacher = map(features_of, pair())
    want, _ = MaKDObjective()(student, teacher, LABELS, MASK)
    for features in (student, teacher):
        features.hidden = [state.masked_fill(MASK[..., None] == 0, torch.nan) for state in features.hidden]
    got, _ = MaKDObjective()(student, teacher, LABELS, MASK)
    assert torch.equal(got, want)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_stands_alone(part):
    student, teacher = map(features_of, pair())
    weights = {f"{other}_weight": float(other == part) for other in PARTS}
    total, parts = MaKDObjective(**weights)(student, teacher, LABELS, MASK)
    assert list(parts) == [part]
    torch.testing.assert_close(total, parts[part])


def test_chosen_layers():
    student, teacher = map(features_of, pair())
    all_layers, _ = MaKDObjective()(student, teacher, LABELS, MASK)
    assert torch.equal(MaKDObjective(layers=(0, 1, 2))(student, teacher, LABELS, MASK)[0], all_layers)
    last = []
    for whole in (student, teacher):
        outputs = {name: output for name, output in whole.outputs.items() if name.startswith("2.")}
        last.append(Features(whole.hidden[-1:] * 2, whole.attention[-1:], outputs, {}, whole.logits))
    _, want = MaKDObjective()(*last, LABELS, MASK)
    _, got = MaKDObjective(layers=(2,))(student, teacher, LABELS, MASK)
    torch.testing.assert_close(got, want)


def test_stages_train_one_level_at_a_time():
    objective = MaKDObjective(stages=(0.25, 0.5))
    on = lambda progress: {p for p in PARTS if objective.at(progress).weights[p]}  # noqa: E731
    assert on(0.0) == on(0.24) == {"mha", "ffn"}
    assert on(0.25) == {"attention", "hidden"}
    assert on(0.5) == on(1.0) == {"logits", "labels"}
    assert MaKDObjective().at(0.3) == MaKDObjective()


@pytest.mark.parametrize(
    "name", ["0.attention.self.query", "1.attn.c_attn", "2.self_attn.q_proj", "0.attention.out_lin"]
)
def test_maps_of_attention(name):
    assert is_attention(name)
    assert not is_attention("0.intermediate.dense")
    assert not is_attention("0.output.dense")
    assert not is_attention("0.mlp.c_fc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mha_weight": -1.0}, "mha_weight must be a number of at least 0, got -1"),
        ({f"{part}_weight": 0.0 for part in PARTS}, "are all 0: nothing would be learned"),
        ({"matrix_form": "both"}, "matrix_form must be one of output, weight, got 'both'"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"layers": (-1,)}, "layers must name layers from 0"),
        ({"stages": (0.5, 0.2)}, "stages must be two rising numbers between 0 and 1"),
        ({"stages": (0.2, 0.5), "mha_weight": 0.0, "ffn_weight": 0.0}, "the matrix level a part of the steps"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaKDObjective(**options)


def test_models_that_do_not_line_up_are_refused():
    student, teacher = map(features_of, pair())
    shorter = copy.copy(teacher)
    shorter.attention = teacher.attention[:2]
    with pytest.raises(ValueError, match="attention are compared layer by layer: the student has 3, the teacher 2"):
        MaKDObjective()(student, shorter, LABELS, MASK)
    other = copy.copy(teacher)
    other.outputs = {name: output for name, output in teacher.outputs.items() if name != "0.output.dense"}
    with pytest.raises(ValueError, match=r"one model alone has 0\.output\.dense"):
        MaKDObjective()(student, other, LABELS, MASK)
    wider = copy.copy(teacher)
    wider.hidden = [torch.cat([state, state], -1) for state in teacher.hidden]
    message = r"states after layer 0: the student's has shape \(2, 12, 32\) and the teacher's \(2, 12, 64\)"
    with pytest.raises(ValueError, match=message):
        MaKDObjective()(student, wider, LABELS, MASK)
    headed = copy.copy(teacher)
    headed.attention = [a._replace(query=a.query[:, :2]) for a in teacher.attention]
    with pytest.raises(ValueError, match="queries of layer 0: the student's has shape"):
        MaKDObjective()(student, headed, LABELS, MASK)
    unanswered = copy.copy(teacher)
    unanswered.logits = None
    with pytest.raises(ValueError, match="features have no logits"):
        MaKDObjective()(student, unanswered, LABELS, MASK)


@pytest.mark.parametrize("form", ["output", "weight"])
@pytest.mark.parametrize("part", ["attention", "hidden", "mha", "ffn"])
def test_layers_that_the_models_do_not_have_are_refused(part, form):
    weights = {f"{other}_weight": float(other in (part, "labels")) for other in PARTS}
    objective = MaKDObjective(**weights, matrix_form=form, layers=(0, 3))
    with pytest.raises(ValueError, match="layers has 3; there are 3 layers, from 0"):
        objective(*map(features_of, pair()), LABELS, MASK)
