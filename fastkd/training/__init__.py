"""Training on several tasks. Importing it registers the models with the Auto classes."""

from fastkd.training.sampler import MultiTaskBatchSampler
from fastkd.training.teacher import MultiTaskEncoder, MultiTaskEncoderConfig, load_teacher, train_teacher
from fastkd.training.trainer import MultiTaskTrainer

__all__ = [
    "MultiTaskBatchSampler",
    "MultiTaskEncoder",
    "MultiTaskEncoderConfig",
    "MultiTaskTrainer",
    "load_teacher",
    "train_teacher",
]
