"""Student models."""

from fastkd.students.bilstm import BiAttentiveLSTM, BiAttentiveLSTMConfig

__all__ = ["BiAttentiveLSTM", "BiAttentiveLSTMConfig"]
