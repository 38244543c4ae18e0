"""K-FAC on all weights, FSDP2 through accelerate: `torchrun --nproc_per_node 4 trainer_kfac_fsdp2.py`."""

from datasets import Dataset
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import dsso

tokenizer = ByT5Tokenizer()
sums = [f"{a} + {b} = {a + b}" for a in range(20) for b in range(20)]
data = Dataset.from_list([{"input_ids": tokenizer(text).input_ids} for text in sums])
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))

args = TrainingArguments(
    output_dir="runs/kfac_fsdp2",
    fsdp=True,
    fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    per_device_train_batch_size=8,
    learning_rate=0.1,
    max_steps=10,
    logging_steps=2,
    save_steps=5,
    report_to=[],
)
trainer = Trainer(model, args, DataCollatorForLanguageModeling(tokenizer, mlm=False), data)
dsso.attach(trainer, {"optimizer": {"type": "KFAC", "params": {"lr": "auto", "damping": 0.1}}})
trainer.train()
