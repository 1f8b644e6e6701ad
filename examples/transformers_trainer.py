"""New layers of a pretrained model start from the training data: `pip install 'sylinit[transformers]'`."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

from sylinit.integrations.transformers import SylvesterCallback

torch.manual_seed(0)
folder = tempfile.mkdtemp()
config = BertConfig(vocab_size=15, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
BertModel(config).save_pretrained(folder)  # stands for a backbone from the hub
model = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
data = [{"input_ids": 5 * (i % 3) + torch.randint(0, 5, (8,)), "labels": i % 3} for i in range(90)]

callback = SylvesterCallback()  # the one line; or initialize_trainer_(trainer) before trainer.train()
arguments = TrainingArguments(folder, max_steps=10, report_to=[], use_cpu=True, save_strategy="no")
Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()

report = callback.report
print(report)
assert report is not None
assert [layer.name for layer in report.initialized] == ["classifier"]
assert (report.before.accuracy or 0) > 0.9
