"""Serves a distilled BiLSTM student by compiled kernels, without torch.

student = fastkd.runtime.load("student/")
student.predict(["a moving and funny film"])
"""

from fastkd.runtime.student import Prediction, Student, load

__all__ = ["Prediction", "Student", "load"]
