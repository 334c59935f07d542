"""Low-rank students: which matrices of a model become two factors, and of which rank, within a budget of parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastkd.students.calibration import token_moments
from fastkd.students.layers import transformer_layers
from fastkd.students.low_rank import LowRankEmbedding, LowRankLinear, dense_weight, factor_class
from fastkd.students.low_rank_loading import exchange, forget_ranks, remember_ranks
from fastkd.students.plan import Matrix, Plan

Model = TypeVar("Model", bound=PreTrainedModel)
Allocation = Literal["uniform", "spectrum"]
ALLOCATIONS = ("uniform", "spectrum")


def plan_factorization(
    model: PreTrainedModel,
    *,
    parameters: int | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    maps: bool = True,
    embedding: bool | None = None,
    allocation: Allocation = "uniform",
    weights: Mapping[str, float] | None = None,
) -> Plan:
    """The ranks that fit a budget, before anything is changed.

    Candidates are the linear maps of the layers, the pooler's, and the word embedding with the head that shares it. A
    matrix stays whole where two factors would not be smaller.

    Args:
        model: an encoder or a decoder of transformers with any head, or a ``MultiTaskEncoder``.
        parameters: the student's number of parameters at most, all of them counted.
        ratio: the same as a part of the model's.
        rank: of every matrix, in place of a budget.
        maps: whether the linear maps are candidates.
        embedding: whether the word embedding is a candidate. None: where keeping it whole would leave the linear
            maps less than half the ranks that they have otherwise, or cannot be afforded; a choice of this project.
        allocation: ``"uniform"`` gives all matrices one rank; ``"spectrum"`` gives the next rank to the matrix where
            it keeps the largest part of its squared norm for the same part of its parameters. The paper's is not
            known to us.
        weights: by a pattern of names, as ``"*.attention.*"``: the rank, or the gain, of these is multiplied.
            ``allocation`` and ``weights`` divide a budget, so they are of no use with ``rank``.

    Raises:
        ValueError: not exactly one of ``parameters``, ``ratio`` and ``rank``; a rank at which nothing becomes
            smaller, or one beside ``weights`` or ``"spectrum"``; a budget that rank 1 exceeds or that the whole model
            does not fill; a pattern that fits no matrix; a quantised model; ``embedding=True`` where the word embedding
            does more than to look up rows.
    """
    if sum(option is not None for option in (parameters, ratio, rank)) != 1:
        raise ValueError("give exactly one of parameters, ratio and rank")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{type(model).__name__} is quantised or low-rank already; factorise the model it was made of")
    if not (maps or embedding):
        raise ValueError("maps is False, and embedding is not True: nothing would be factorised")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
    if rank is not None and (weights or allocation != "uniform"):
        raise ValueError("rank is of every matrix: allocation and weights need a budget, parameters or ratio")
    linear, table = _linear_maps(model) if maps else {}, _word_embedding(model)
    if embedding and not table:
        kind = type(model.get_input_embeddings()).__name__
        raise ValueError(f"embedding is True, but the word embedding is a {kind}; only an nn.Embedding has factors")
    _check_weights(weights, [*linear, *table])
    before = sum(parameter.numel() for parameter in model.parameters())
    if rank is not None:
        candidates = _Candidates({**table, **linear} if embedding else linear, weights, "uniform")
        return _plan(model, candidates, candidates.all_of(rank), before)
    budget = _budget(parameters, ratio, before)
    found = []
    for factors_words in (False, True) if embedding is None else (embedding,):
        candidates = _Candidates({**table, **linear} if factors_words else linear, weights, allocation)
        ranks = _fit(candidates, budget, before)
        if ranks is not None:
            found.append((candidates, ranks))
    if not found:
        least = before - candidates.saved(candidates.all_of(1))
        raise ValueError(f"a budget of {budget:,} parameters cannot be met: rank 1 everywhere leaves {least:,}")
    of_maps = [sum(ranks[name] for name in linear) for _, ranks in found]
    return _plan(model, *found[0 if of_maps[0] >= of_maps[-1] / 2 else -1], before)


def factorize(model: Model, plan: Plan, batches: Iterable[Mapping[str, Any]] | None = None) -> Model:
    """A copy of the model, to be trained, whose matrices are the factors that a plan tells, by truncated SVD.

    With ``batches`` of the model's inputs, some hundreds of texts as it will meet, the factors keep most of what the
    matrices give on these rather than most of the weights (:mod:`fastkd.students.calibration`). It takes memory for
    a square matrix of each one's inputs. How MaKD's students begin is not known to us: a choice of this project.

    ``save_pretrained`` stores the ranks in the configuration; ``from_pretrained`` of the model's class and of the
    ``Auto*`` classes loads it, once ``fastkd.students`` has been imported.

    Raises:
        ValueError: the plan is of another model; ``batches`` is empty, or has a batch that gives NaN or infinity.
    """
    modules = dict(model.named_modules())
    for matrix in plan.matrices:
        if matrix.name not in modules or tuple(dense_weight(modules[matrix.name]).shape) != matrix.shape:
            raise ValueError(f"plan has {matrix.name}, {matrix.shape}, which this {type(model).__name__} does not have")
    moments = {} if batches is None else token_moments(model, plan.ranks, batches)
    student = copy.deepcopy(model)
    with torch.autocast(model.device.type, enabled=False):
        for name, rank in plan.ranks.items():
            dense = student.get_submodule(name)
            exchange(student, name, factor_class(dense).from_dense(dense, rank, moments.pop(name, None)))
    remember_ranks(student, plan.ranks)
    return student.requires_grad_(True)  # as a copy of a frozen teacher it would not learn


def fit_embedding(model: Model, parameters: int, batches: Iterable[Mapping[str, Any]] | None = None) -> Model:
    """The model, or where it has more than so many parameters a copy whose word embedding is two factors.

    ``batches``, raises: as :func:`plan_factorization` and :func:`factorize`.
    """
    if model.num_parameters() <= parameters:
        return model
    return factorize(model, plan_factorization(model, parameters=parameters, embedding=True, maps=False), batches)


def merge(model: Model) -> Model:
    """A copy with dense matrices in place of all factors: an ordinary model of its class."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, LowRankLinear | LowRankEmbedding):
            exchange(dense, name, module.merged())
    forget_ranks(dense)
    return dense


class _Candidates:
    """Matrices with what each further rank of each is worth, falling."""

    def __init__(
        self, modules: Mapping[str, nn.Module], weights: Mapping[str, float] | None, allocation: Allocation
    ) -> None:
        self.modules = dict(modules)
        self.shapes = {name: tuple(dense_weight(module).shape) for name, module in modules.items()}
        self.gains = {name: _weight_of(name, weights) * self._gain(name, allocation) for name in modules}

    def _gain(self, name: str, allocation: Allocation) -> Tensor:
        out, into = self.shapes[name]
        if allocation == "uniform":
            return 1 / torch.arange(1, min(out, into) + 1, dtype=torch.float64)
        return energies(dense_weight(self.modules[name])) * out * into / (out + into)

    def ranks_above(self, gain: float) -> dict[str, int]:
        return {name: max(1, int((values >= gain).sum())) for name, values in self.gains.items()}

    def all_of(self, rank: int) -> dict[str, int]:
        """That rank for every matrix.

        Raises:
            ValueError: it is no whole number, below 1, or so high that no matrix becomes smaller.
        """
        most = max((out * into - 1) // (out + into) for out, into in self.shapes.values())
        if type(rank) is not int or not 1 <= rank <= most:
            raise ValueError(
                f"rank is {rank!r}; it must be a whole number from 1 to {most}, above which no matrix becomes smaller"
            )
        return dict.fromkeys(self.modules, rank)

    def saved(self, ranks: Mapping[str, int]) -> int:
        shapes = [(self.shapes[name], rank) for name, rank in ranks.items()]
        return sum(max(0, out * into - rank * (out + into)) for (out, into), rank in shapes)


def _fit(candidates: _Candidates, budget: int, before: int) -> dict[str, int] | None:
    """The largest ranks within the budget, None if there are none: a bisection over the gains, falling."""
    gains = torch.cat(list(candidates.gains.values())).unique().flip(0).tolist()
    low, high = 0, len(gains)
    while low < high:
        middle = (low + high) // 2
        if before - candidates.saved(candidates.ranks_above(gains[middle])) <= budget:
            low = middle + 1
        else:
            high = middle
    return candidates.ranks_above(gains[low - 1]) if low else None


def _plan(model: PreTrainedModel, candidates: _Candidates, ranks: Mapping[str, int], before: int) -> Plan:
    rows = []
    for name, module in candidates.modules.items():
        (out, into), rank = candidates.shapes[name], ranks[name]
        smaller = rank * (out + into) < out * into
        kept = float(energies(dense_weight(module))[:rank].sum()) if smaller else 1.0
        rows.append(Matrix(name, (out, into), rank if smaller else None, kept))
    return Plan(tuple(rows), tuple(_others(model, candidates.modules)), before, before - candidates.saved(ranks))


def _others(model: PreTrainedModel, candidates: Mapping[str, nn.Module]) -> list[str]:
    """Modules with a matrix that are no candidates; other tensors, as of stacked experts, by their own names."""
    of_candidates = {id(parameter) for module in candidates.values() for parameter in module.parameters()}
    names: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in of_candidates:
            owner, _, leaf = name.rpartition(".")
            names[owner if leaf == "weight" else name] = None
    return list(names)


def energies(weight: Tensor) -> Tensor:
    """What part of its squared Frobenius norm each singular value of a matrix holds, float64, falling.

    Of a matrix of zeros the first holds all.
    """
    squares: Tensor = torch.linalg.svdvals(weight.detach().float()).double().square()
    squares[0] += squares.sum() == 0
    return squares / squares.sum()


def _linear_maps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Those of the layers and of a pooler."""
    _, layers = transformer_layers(model)
    inside = set(layers.modules())
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and (module in inside or ".pooler." in f".{name}")
    }


def _word_embedding(model: PreTrainedModel) -> dict[str, nn.Module]:
    words = model.get_input_embeddings()
    return {name: module for name, module in model.named_modules() if module is words and type(words) is nn.Embedding}


def _budget(parameters: int | None, ratio: float | None, before: int) -> int:
    if ratio is not None and not 0 < ratio < 1:
        raise ValueError(f"ratio must be above 0 and below 1, got {ratio}")
    budget = round(ratio * before) if ratio is not None else parameters
    assert budget is not None
    if not 0 < budget < before:
        raise ValueError(f"parameters is {budget:,}; it must be less than the model's {before:,}")
    return budget


def _weight_of(name: str, weights: Mapping[str, float] | None) -> float:
    for pattern, weight in (weights or {}).items():
        if fnmatch(name, pattern):
            return weight
    return 1.0


def _check_weights(weights: Mapping[str, float] | None, names: list[str]) -> None:
    for pattern, weight in (weights or {}).items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights[{pattern!r}] must be positive and finite, got {weight}")
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"weights has {pattern!r}, which fits no matrix; there are {', '.join(names)}")
