"""MeZO on all weights: `python trainer_mezo.py`, or `torchrun --nproc_per_node 4 trainer_mezo.py`."""

from datasets import Dataset
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

import dsso

tokenizer = ByT5Tokenizer()
sums = [f"{a} + {b} = {a + b}" for a in range(20) for b in range(20)]
data = Dataset.from_list([{"input_ids": tokenizer(text).input_ids} for text in sums])
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))

args = TrainingArguments(
    output_dir="runs/mezo",
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    max_steps=10,
    logging_steps=2,
    save_steps=5,
    report_to=[],
)
trainer = dsso.ForwardTrainer(
    model,
    args,
    DataCollatorForLanguageModeling(tokenizer, mlm=False),
    data,
    optimizer={"optimizer": {"type": "MeZO", "params": {"lr": "auto", "eps": 1e-3}}},
)
trainer.train()
