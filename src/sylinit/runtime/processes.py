"""What one pass needs from the other processes of a ``torch.distributed`` group; trivial without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sylinit.errors import SylinitError
from sylinit.runtime.interrupts import Held, held_interrupts

T = TypeVar("T")


class ProcessFailedError(SylinitError):
    """Another process of the group failed; the message says which one and how."""


class Processes:
    """A process group, or this process alone.

    Args:
        group: a ``torch.distributed`` group, or None.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise SylinitError(
                f"group must be a torch.distributed process group or None, got {group!r}; pass "
                "torch.distributed.group.WORLD for all processes"
            )
        self._group = group
        self._held: Held | None = None
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    @property
    def ranks(self) -> list[int]:
        """The global ranks of the processes."""
        if self._group is not None:
            return dist.get_process_group_ranks(self._group)
        return [dist.get_rank() if dist.is_available() and dist.is_initialized() else 0]

    @contextmanager
    def held_interrupts(self) -> Iterator[Held]:
        """Hold Ctrl-C back until the next `agree`: it never comes amid PyTorch's contexts, or while others wait."""
        with held_interrupts() as self._held:
            yield self._held

    def agree(self, work: Callable[[], T]) -> list[T]:
        """Do some local work and share its (small) result; if it fails in one process, raise in all.

        Returns:
            The results of all processes, in order of rank.

        Raises:
            ProcessFailedError: another process failed. A failure of this process is raised as it is.
        """
        if self.size == 1:
            alone = work()
            if self._held is not None:
                self._held.deliver()
            return [alone]
        error: BaseException | None = None
        result: Any = None
        try:
            result = work()
            if self._held is not None:
                self._held.deliver()
        except BaseException as caught:
            error = caught
        shared: list[Any] = [None] * self.size
        dist.all_gather_object(shared, (None if error is None else _describe(error), result), group=self._group)
        if error is not None:
            error.__dict__["sylinit_shared"] = True
            raise error
        for rank, (message, _) in enumerate(shared):
            if message is not None:
                raise ProcessFailedError(f"process {rank} of the group failed: {message}")
        return [value for _, value in shared]

    def together(self, work: Callable[[], T]) -> T:
        """Do some local work whose result stays here; if it fails in one process, raise in all."""
        result: list[T] = []
        self.agree(lambda: result.append(work()))
        return result[0]

    def announce(self, error: BaseException) -> None:
        """Tell processes that wait in `agree` that this one has failed, unless they know."""
        if self.size == 1 or isinstance(error, ProcessFailedError) or "sylinit_shared" in error.__dict__:
            return
        dist.all_gather_object([None] * self.size, (_describe(error), None), group=self._group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            whole = tensor.contiguous()
            dist.all_reduce(whole, group=self._group)
            if whole is not tensor:
                tensor.copy_(whole)
        return tensor

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Concatenate rows ``[n, ...]`` of all processes, ``counts[rank]`` each, in order of rank."""
        if self.size == 1:
            return rows
        longest = max(counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Give every process the tensor of the first one, in place."""
        if self.size > 1:
            dist.broadcast(tensor, self.ranks[0], group=self._group)
        return tensor


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
