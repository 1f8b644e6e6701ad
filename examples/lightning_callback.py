"""A LightningModule that starts from its training data: `pip install 'sylinit[lightning]'`."""

from typing import Any

import lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sylinit.integrations.lightning import SylvesterInitialization


class Classifier(pl.LightningModule):
    """The usual kind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), 0.01)


torch.manual_seed(0)
y = torch.arange(200) % 4
x = torch.randn(4, 20)[y] + 0.5 * torch.randn(200, 20)
loader = DataLoader(TensorDataset(x, y), 50, shuffle=True)
start, module = SylvesterInitialization(), Classifier()  # the one line
pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[start], logger=False, enable_checkpointing=False).fit(
    module, loader
)
assert (module.net(x).argmax(1) == y).double().mean() > 0.9
