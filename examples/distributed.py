"""Initialize a model from data that is split over processes, then train it; every process holds the same weights.

    torchrun --nproc_per_node 2 examples/distributed.py                  # a bare model
    torchrun --nproc_per_node 2 examples/distributed.py --wrap ddp       # DistributedDataParallel
    torchrun --nproc_per_node 2 examples/distributed.py --wrap fsdp      # fully_shard
    python examples/distributed.py                                       # one process, for comparison

It runs on GPUs (NCCL) where there are any, else on CPUs (gloo).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import sylinit


def make_model() -> nn.Module:
    """A small convolutional network."""
    torch.manual_seed(0)  # the same in every process, as DistributedDataParallel and fully_shard want it anyway
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)),
    )


def make_data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of stripes in four directions, and the directions."""
    generator = torch.Generator().manual_seed(seed)
    down, right = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    directions = torch.stack([down, right, down + right, down - right])
    y = torch.arange(count) % 4
    phase = 6 * torch.rand(count, 1, 1, generator=generator)
    x = (1.5 * directions[y] + phase).sin() + 1.5 * torch.randn(count, 12, 12, generator=generator)
    return x.unsqueeze(1), y


def share(x: Tensor, y: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    """This process's consecutive share of the samples, in batches.

    `initialize_` does not mind if some processes have more batches than others; training with the wrappers does.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = x.tensor_split(size)[rank], y.tensor_split(size)[rank]
    return list(zip(x.split(batch), y.split(batch), strict=True))


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], device: str) -> None:
    """As always."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for x, y in 5 * batches:
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, device: str) -> float:
    """Share of new samples that are told apart."""
    x, y = make_data(400, seed=1)
    model.eval()
    correct = (model(x.to(device)).argmax(1).cpu() == y).double().mean()
    model.train()
    return float(correct)


def main() -> None:
    """What `torchrun` starts in every process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", choices=["bare", "ddp", "fsdp"], default="bare")
    parser.add_argument("--save", metavar="FILE", help="where to save the weights; {rank} stands for the rank")
    arguments = parser.parse_args()

    device, group = "cuda" if torch.cuda.is_available() else "cpu", None
    if "RANK" in os.environ:  # started by torchrun
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        group = dist.group.WORLD

    model = make_model().to(device)
    if arguments.wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif arguments.wrap == "fsdp":
        fully_shard(model)

    batches = share(*make_data(600, seed=0), batch=50)
    report = sylinit.initialize_(model, batches, group=group)

    weights = model.state_dict()  # in all processes together: with fully_shard every process has a part
    weights = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in weights.items()}
    if arguments.save:
        torch.save(weights, arguments.save.format(rank=dist.get_rank() if group else 0))
    before = accuracy(model, device)
    if arguments.wrap != "bare" or group is None:  # a bare model does not exchange gradients
        train(model, batches, device)
    after = accuracy(model, device)
    if group is None or dist.get_rank() == 0:
        print(report)
        print(f"accuracy before training {before:.1%}, afterwards {after:.1%}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
