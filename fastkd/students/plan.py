"""What is to become of a model's matrices, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """A row of a :class:`Plan`: ``rank`` None keeps the matrix of ``shape`` (out, in) as it is.

    ``energy`` is the part of its squared Frobenius norm that truncated SVD keeps.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    energy: float

    @property
    def parameters(self) -> int:
        """Its weights, without a bias."""
        return self.shape[0] * self.shape[1] if self.rank is None else self.rank * sum(self.shape)


@dataclass(frozen=True)
class Plan:
    """What :func:`fastkd.factorize` does, as a table when printed.

    Args:
        matrices: those that can be factorised, in the model's order.
        others: what else has two dimensions or more and stays: names of modules, or of parameters that are no
            ``weight``.
        before, after: parameters of the model, shared ones counted once.
    """

    matrices: tuple[Matrix, ...]
    others: tuple[str, ...]
    before: int
    after: int

    @property
    def ranks(self) -> dict[str, int]:
        return {matrix.name: matrix.rank for matrix in self.matrices if matrix.rank is not None}

    def __str__(self) -> str:
        width = max(len(matrix.name) for matrix in self.matrices)
        lines = [f"{'matrix':<{width}}  {'out × in':>13}  rank  {'parameters':>23}  energy kept"]
        for matrix in self.matrices:
            out, into = matrix.shape
            rank = "full" if matrix.rank is None else f"{matrix.rank}"
            count = f"{out * into:,} → {matrix.parameters:,}"
            lines.append(f"{matrix.name:<{width}}  {out:>6} × {into:<4}  {rank:>4}  {count:>23}  {matrix.energy:>9.1%}")
        lines.append(f"all parameters: {self.before:,} → {self.after:,} ({self.after / self.before:.1%})")
        if self.others:
            lines.append(f"not factorised: {', '.join(self.others)}")
        return "\n".join(lines)
