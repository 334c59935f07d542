"""MKD in Python: distil a teacher of `fastkd teacher` into a BiLSTM, then read a sentence with it.

Needs a teacher, for example:
  fastkd teacher --model sentence-transformers/all-MiniLM-L6-v2 --tasks sst2,mrpc --output runs/teacher
"""

import sys

import torch
from transformers import AutoTokenizer

from fastkd import BiAttentiveLSTM, BiAttentiveLSTMConfig, MKDConfig, MKDTrainer
from fastkd.data.encode import MultiTaskCollator, load_encoded
from fastkd.training.signals import TeacherSignal, add_teacher_logits
from fastkd.training.teacher import load_teacher

folder, *data_dir = sys.argv[1:] or ["runs/teacher"]
teacher, tokenizer = load_teacher(folder), AutoTokenizer.from_pretrained(folder)
tasks = teacher.config.tasks
train, validation = load_encoded(list(tasks), tokenizer, max_length=128, data_dir=data_dir[0] if data_dir else None)

# Optional: the teacher reads every row once instead of once per epoch.
collate = MultiTaskCollator(tokenizer)
signal = TeacherSignal(teacher, {name: task["labels"] for name, task in tasks.items()})
train = add_teacher_logits(train, signal, collate, cache_dir="runs/teacher-logits")

table = teacher.get_input_embeddings().weight.detach()
sizes = {"vocab_size": table.shape[0], "embedding_size": table.shape[1]}
student = BiAttentiveLSTM(BiAttentiveLSTMConfig.preset("small", tasks=tasks, **sizes))
student.use_embeddings(table)

args = MKDConfig("runs/student", num_train_epochs=4, learning_rate=2e-3, save_strategy="no")
trainer = MKDTrainer(student, args, collate, train, validation, teacher=teacher)
trainer.train()
print(trainer.evaluate()["eval_average"])
trainer.save_model("runs/student")

name = next(iter(tasks))
with torch.inference_mode():
    print(student.eval()(**tokenizer("a fine film", return_tensors="pt"), task=name).logits)
