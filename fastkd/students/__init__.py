"""Student models. Importing it registers them with the Auto classes."""

from fastkd.students.bilstm import BiAttentiveLSTM, BiAttentiveLSTMConfig
from fastkd.students.transformer import first_layers, transformer_student

__all__ = ["BiAttentiveLSTM", "BiAttentiveLSTMConfig", "first_layers", "transformer_student"]
