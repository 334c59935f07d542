"""MaKD of a reader in Python: a low-rank student of any question answering model, on SQuAD.

  python examples/distil_squad.py TEACHER [DATA]

TEACHER is a folder or a name on the Hub, DATA a folder with train.json and dev.json in SQuAD's layout (docs/data.md).
"""

import sys

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from fastkd import MaKDConfig, factorize, plan_factorization
from fastkd.data.batches import sample_batches, span_collator
from fastkd.data.squad import load_squad
from fastkd.data.squad_windows import encode_squad
from fastkd.methods.feature_distillation import SpanDistillationTrainer

name, *data_dir = sys.argv[1:]
teacher, tokenizer = AutoModelForQuestionAnswering.from_pretrained(name), AutoTokenizer.from_pretrained(name)
splits = load_squad("squad", data_dir[0] if data_dir else None)
train, questions = splits["train"], splits["validation"]
length = min(384, tokenizer.model_max_length)
train_windows, windows = (encode_squad(rows, tokenizer, max_length=length) for rows in (train, questions))

collate = span_collator(tokenizer)
student = factorize(teacher, plan_factorization(teacher, ratio=0.5), sample_batches(train_windows, collate, 512))
args = MaKDConfig(
    "runs/reader", per_device_train_batch_size=16, num_train_epochs=3, learning_rate=1e-4, save_strategy="no",
    use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = SpanDistillationTrainer(
    student, args, collate, train_windows, windows, eval_questions=questions,
    objective=args.objective(), teacher=teacher,
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
trainer.save_model("runs/reader")
