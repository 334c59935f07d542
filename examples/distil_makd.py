"""MaKD in Python: the teacher's matrices become two factors each, which learn its attention, states and matrices.

Needs a teacher, for example:
  fastkd teacher --model sentence-transformers/all-MiniLM-L6-v2 --tasks sst2 --max-train-rows 5000 --output runs/teacher
"""

import sys
from itertools import islice

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from fastkd import MaKDConfig, MaKDTrainer, factorize, plan_factorization
from fastkd.data.encode import MultiTaskCollator, load_encoded
from fastkd.training.sampler import MultiTaskBatchSampler
from fastkd.training.teacher import load_teacher

folder, *data_dir = sys.argv[1:] or ["runs/teacher"]
teacher, tokenizer = load_teacher(folder), AutoTokenizer.from_pretrained(folder)
tasks = list(teacher.config.tasks)
data_dir = data_dir[0] if data_dir else None
train, validation = load_encoded(tasks, tokenizer, max_length=128, data_dir=data_dir, max_train_rows=5000)

plan = plan_factorization(teacher, ratio=0.7)
print(plan)
collate = MultiTaskCollator(tokenizer)
sample = DataLoader(train, batch_sampler=MultiTaskBatchSampler(train.sizes, 32, tau=0.0), collate_fn=collate)
student = factorize(teacher, plan, islice(sample, 16))  # calibrated on 512 rows

cpu = not torch.cuda.is_available()
args = MaKDConfig("runs/student", num_train_epochs=3, learning_rate=1e-4, save_strategy="no", use_cpu=cpu)
trainer = MaKDTrainer(student, args, collate, train, validation, teacher=teacher)
trainer.train()
print(trainer.evaluate()["eval_average"])
trainer.save_model("runs/student")
