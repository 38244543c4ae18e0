"""K-FAC on LoRA adapters, DeepSpeed ZeRO-2: `deepspeed trainer_kfac_deepspeed.py`."""

from datasets import Dataset
from peft import LoraConfig, get_peft_model
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
# In the place of AutoModelForCausalLM.from_pretrained(…), so that nothing is downloaded.
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))

recipe = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "KFAC", "params": {"lr": "auto", "damping": 0.1, "inverse_interval": 5}},
}
args = TrainingArguments(
    output_dir="runs/kfac_deepspeed",
    deepspeed=recipe,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=0.1,
    max_steps=10,
    logging_steps=2,
    save_steps=5,
    report_to=[],
)
trainer = Trainer(model, args, DataCollatorForLanguageModeling(tokenizer, mlm=False), data)
dsso.attach(trainer)
trainer.train()
