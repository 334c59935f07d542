"""MixKD in Python: three layers of a teacher of `fastkd teacher` also learn its answers to mixtures of examples.

Needs a teacher of a tenth of the rows, as the student is trained on these too, for example:
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
train, validation = load_encoded(tasks, tokenizer, max_length=128, data_dir=data_dir, train_fraction=0.1)

torch.manual_seed(0)
layers, pooling = min(3, teacher.config.encoder.num_hidden_layers), teacher.config.pooling
student = transformer_student(teacher, layers, tasks, pooling=pooling, head_size=None)

cpu = not torch.cuda.is_available()
args = MixKDConfig("runs/student", num_train_epochs=3, learning_rate=1e-4, save_strategy="no", use_cpu=cpu)
trainer = MixKDTrainer(student, args, MultiTaskCollator(tokenizer), train, validation, teacher=teacher)
trainer.train()
print(trainer.evaluate()["eval_average"])
trainer.save_model("runs/student")

with torch.inference_mode():
    print(student.eval()(**tokenizer("a fine film", return_tensors="pt"), task=tasks[0]).logits)
