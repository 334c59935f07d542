"""Student models. Importing it registers them with the Auto classes."""

from fastkd.students.bilstm import BiAttentiveLSTM, BiAttentiveLSTMConfig

# After the modules above, which they need.
from fastkd.students.factorization import factorize, fit_embedding, merge, plan_factorization
from fastkd.students.low_rank import LowRankEmbedding, LowRankLinear
from fastkd.students.plan import Plan
from fastkd.students.transformer import first_layers, shallow, transformer_student

__all__ = [
    "BiAttentiveLSTM",
    "BiAttentiveLSTMConfig",
    "LowRankEmbedding",
    "LowRankLinear",
    "Plan",
    "factorize",
    "first_layers",
    "fit_embedding",
    "merge",
    "plan_factorization",
    "shallow",
    "transformer_student",
]
