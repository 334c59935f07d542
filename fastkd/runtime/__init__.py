"""Serves a distilled BiLSTM student by compiled kernels, without torch.

student = fastkd.runtime.load("student/")
student.predict(["a moving and funny film"])

:class:`BiLSTM` is the layer alone, for models of another kind.
"""

from fastkd.runtime.bilstm import BiLSTM
from fastkd.runtime.student import Prediction, Student, load

__all__ = ["BiLSTM", "Prediction", "Student", "load"]
