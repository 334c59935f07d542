"""MixKD in Python: three layers of a teacher of `fastkd teacher` also learn its answers to mixtures of examples.

Needs a teacher, for example:
  fastkd teacher --model sentence-transformers/all-MiniLM-L6-v2 --tasks sst2 --train-fraction 0.1 --output runs/teacher
"""

import sys

import torch
from transformers import AutoTokenizer

from fastkd import MixKDConfig, MixKDTrainer
from fastkd.data.encode import MultiTaskCollator, load_encoded
from fastkd.students import transformer_student
from fastkd.training.teacher import load_teacher

folder, *data_dir = sys.argv[1:] or ["runs/teacher"]
teacher, tokenizer = load_teacher(folder), AutoTokenizer.from_pretrained(folder)
tasks = list(teacher.config.tasks)
data_dir = data_dir[0] if data_dir else None
train, validation = load_encoded(tasks, tokenizer, max_length=128, data_dir=data_dir)

torch.manual_seed(0)
student = transformer_student(
    teacher,
    layers=min(3, teacher.config.encoder.num_hidden_layers),
    tasks=tasks,
    pooling=teacher.config.pooling,
    head_size=None,
)

args = MixKDConfig(
    "runs/student", num_train_epochs=3, learning_rate=5e-5, alpha_sm=1.0, alpha_tmkd=1.0, save_strategy="no"
)
trainer = MixKDTrainer(student, args, MultiTaskCollator(tokenizer), train, validation, teacher=teacher)
trainer.train()
print(trainer.evaluate()["eval_average"])
trainer.save_model("runs/student")

with torch.inference_mode():
    print(student.eval()(**tokenizer("a fine film", return_tensors="pt"), task=tasks[0]).logits)
