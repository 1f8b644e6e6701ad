"""Train several networks of one architecture at once, as one program over stacked weights (`torch.func`).

The runner does not use it: it keeps every core busy with one process a core, results must be stored run by run, and
starts are tuned to different learning rates. Measured on one thread of a busy two-core machine (ratio of the shortest
of five interleaved times, one by one over together): a perceptron on digits 1.4 (6 members) to 1.6 (30 members),
ResNet-20 on 8x8 images 1.6 and on 32x32 images 0.9 (4 members), the CNN on 32x32 images 0.4 (4 members), since a
convolution with weights of its own for each member becomes a grouped one. Worth it for many small perceptrons, such as
a sweep over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from sylinit.errors import SylinitError
from sylinit.study.precision import autocast
from sylinit.study.train import Recipe, augment, batches, cross_entropy


def train_together(
    models: Sequence[nn.Module], x: Tensor, y: Tensor, recipe: Recipe, seeds: Sequence[int]
) -> list[float]:
    """Train `models`, each as `train` would train it alone, and write the trained weights back.

    The loss is the sum over members, whose gradient in each member's weights is the gradient of its own loss; the
    optimisers work element by element, so one optimiser over stacked weights is one optimiser a member.

    Args:
        models: of one architecture, each with its own start; without dropout.
        x: training samples ``[members, n, ...]``.
        y: int64 ``[members, n]``.
        recipe: the same for all members.
        seeds: one a member, of the order of its samples.

    Returns:
        The last loss of each member.

    Raises:
        SylinitError: if the numbers of models, data and seeds differ.
    """
    if not len(models) == len(x) == len(y) == len(seeds):
        raise SylinitError(
            f"train_together: expected one data set and one seed a model, got {len(models)} models, {len(x)} sets "
            f"of samples, {len(y)} of labels and {len(seeds)} seeds"
        )
    for model in models:
        model.train()
    skeleton = models[0]
    parameters, buffers = stack_module_state(list(models))
    stacked = list(parameters.values())
    size = recipe.size(x.shape[1])
    optimiser = recipe.make_optimiser(stacked)
    schedule = recipe.make_schedule(optimiser, math.ceil(x.shape[1] / size) * recipe.epochs)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def loss_of(weights: dict[str, Tensor], state: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        with autocast(x.device, recipe.precision):
            logits = functional_call(skeleton, (weights, state), (sample,))
        return cross_entropy(logits, label)

    members = torch.arange(len(models))[:, None]
    losses = torch.zeros(len(models))
    for _ in range(recipe.epochs):
        # every member draws its order and then, batch by batch, its flips: the same numbers as when it is alone
        orders = [batches(x.shape[1], size, generator) for generator in generators]
        for step in zip(*orders, strict=True):
            index = torch.stack(step)
            sample = torch.stack(
                [augment(x[m, i], recipe, g) for m, (i, g) in enumerate(zip(step, generators, strict=True))]
            )
            losses = vmap(loss_of)(parameters, buffers, sample, y[members, index])
            optimiser.zero_grad(set_to_none=True)
            losses.sum().backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        for place, model in enumerate(models):
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                value.copy_({**parameters, **buffers}[name][place])
    return losses.tolist()
