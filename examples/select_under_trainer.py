"""Select 4 of 16 candidates a step under transformers' own Trainer."""

import tempfile

from gradient_selectors import FilterThenWeight
from gradient_selectors.integrations.transformers import SelectionMixin
from mixture import make_model, make_samples, target_batches, test_loss
from transformers import Trainer, TrainingArguments


class SelectingTrainer(SelectionMixin, Trainer):
    """A Trainer whose batches are pools of candidates."""


dataset = [{"input_ids": ids, "labels": ids} for ids in make_samples(1600, seed=0)]
options = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "learning_rate": 3e-3, "report_to": "none"}
args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, disable_tqdm=True, **options)
model, selector = make_model(), FilterThenWeight(batch_size=4)
SelectingTrainer(model, args, train_dataset=dataset, selector=selector, target=target_batches()).train()
print(f"test loss {test_loss(model):.3f}")
