"""A skorch net that starts from the data passed to fit: `pip install 'sylinit[skorch]'`."""

import torch
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from sylinit.integrations.skorch import SylvesterInitialization

torch.manual_seed(0)
x, y = load_wine(return_X_y=True)
x = StandardScaler().fit_transform(x).astype("float32")
net = NeuralNetClassifier(
    lambda: nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 3)),
    criterion=nn.CrossEntropyLoss,
    max_epochs=2,
    callbacks=[("sylinit", SylvesterInitialization())],  # the one line
)
net.fit(x, y)
print(dict(net.callbacks_)["sylinit"].report_)
assert net.score(x, y) > 0.95
