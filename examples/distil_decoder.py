"""MaKD of a decoder in Python: a low-rank student of any language model, on instructions and responses.

  python examples/distil_decoder.py TEACHER TRAIN.jsonl HELDOUT.jsonl

TEACHER is a folder or a name on the Hub; a line of the files has "instruction", "input" and "output" (docs/data.md).
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkd import MaKDConfig, factorize, plan_factorization
from fastkd.data.batches import language_model_collator, sample_batches
from fastkd.data.instructions import encode_instructions, load_instructions
from fastkd.methods.feature_distillation import LanguageModelDistillationTrainer
from fastkd.training.generation import rouge_of

name, train_file, heldout_file = sys.argv[1:]
teacher, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
heldout = load_instructions(heldout_file)
train, validation = (encode_instructions(rows, tokenizer) for rows in (load_instructions(train_file), heldout))

collate = language_model_collator(tokenizer)
student = factorize(teacher, plan_factorization(teacher, ratio=0.5), sample_batches(train, collate, 512))
args = MaKDConfig(
    "runs/decoder", per_device_train_batch_size=8, num_train_epochs=3, learning_rate=5e-4, save_strategy="no",
    use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
trainer = LanguageModelDistillationTrainer(
    student, args, collate, train, validation, objective=args.objective(), teacher=teacher
)
trainer.train()
print(trainer.evaluate())
print(rouge_of(student, tokenizer, heldout, seeds=(10,)))
trainer.save_model("runs/decoder")
