"""LoRA adapters and a head that start from data: `pip install 'sylinit[peft]'`."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from sylinit.integrations.peft import initialize_adapters_

torch.manual_seed(0)
config = BertConfig(vocab_size=15, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
config.num_labels = 3
backbone = BertForSequenceClassification(config)  # yours is pretrained: from_pretrained(...)
labels = torch.arange(90) % 3
ids = 5 * labels.unsqueeze(1) + torch.randint(0, 5, (90, 8))
batches = [{"input_ids": x, "labels": y} for x, y in zip(ids.split(30), labels.split(30), strict=True)]

lora = LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
model: Any = get_peft_model(backbone, lora).eval()
with model.disable_adapter():
    before = model.base_model.model.bert(ids).pooler_output

report = initialize_adapters_(model, batches)  # the one line

print(report)
assert torch.equal(model.base_model.model.bert(ids).pooler_output, before)  # the function of the body is unchanged
assert (report.before.accuracy or 0) > 0.9  # and the head tells the classes apart before any training
