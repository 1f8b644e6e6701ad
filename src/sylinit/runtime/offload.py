"""Where the activations of waiting workers go while they wait: off the device, so that one worker's worth stays on it.

A waiting worker keeps activations alive in frames of the model's own code, out of reach: a residual branch, a skip
connection. So not tensors are moved but their storages, underneath every tensor that shares them: the bytes are
copied away and the storage is shrunk to nothing; before the worker goes on it is grown and filled again, bit for bit.

Which storages those are is seen at the dispatcher: what an operation of a worker allocated, and is still alive. The
parameters, the buffers and the data were allocated by no worker, and stay. If anything reads a storage that is away
(computing a layer does, and a model that keeps an activation of one worker for the next may), it comes back first.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

SMALLEST = 1 << 16
"""Storages of fewer bytes stay where they are."""


@dataclass(eq=False)
class _Page:
    """A storage that a worker allocated; it is away where ``copy`` holds its bytes and ``here`` is false."""

    storage: weakref.ref[UntypedStorage]
    worker: int
    size: int
    copy: UntypedStorage | Path | None = None
    here: bool = True


class Offload:
    """Moves the activations of waiting workers off the device and back.

    Args:
        device: of the model; only what is there is moved.
        to: "cpu" for the CPU's memory, "disk" for temporary files.

    Attributes:
        peak: the largest number of bytes that were away at one time.
        moved: bytes that were moved away in all.
    """

    def __init__(self, device: torch.device, to: str) -> None:
        self.peak = 0
        self.moved = 0
        self._device = device
        self._folder = tempfile.TemporaryDirectory(prefix="sylinit-") if to == "disk" else None
        self._pages: dict[int, _Page] = {}
        self._worker: int | None = None
        self._guests: set[int] = set()
        self._away = 0

    @contextmanager
    def worker(self, number: int) -> Iterator[None]:
        """Run a worker inside: what it allocates is its own."""
        self._worker = number
        with _Watch(self):
            yield

    @contextmanager
    def parking(self, worker: int) -> Iterator[None]:
        """Wait inside: the worker's activations are away meanwhile. After a failure, `end` brings them back."""
        self._pages = {key: page for key, page in self._pages.items() if page.storage() is not None}
        self._send(worker)
        self._worker = None
        yield
        for page in self._of(worker):
            self._fetch(page)
        self._worker = worker

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read activations of waiting workers inside; those of one worker at a time are on the device."""
        self._worker = None
        with _Watch(self):
            yield
        self._dismiss()

    def end(self) -> None:
        """Bring back whatever is still alive and away."""
        for page in self._pages.values():
            self._fetch(page)
        self._pages.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def need(self, storages: Collection[UntypedStorage]) -> None:
        """Bring back what one operation reads; it may read activations of several workers at once."""
        pages = [page for page in map(self._page, storages) if page is not None and not page.here]
        if not pages:
            return
        if self._worker is not None:  # workers share them through the model: they stay from now on
            for page in pages:
                self._fetch(page)
            self._pages = {key: page for key, page in self._pages.items() if page not in pages}
            return
        self._dismiss(all_but={page.worker for page in map(self._page, storages) if page is not None})
        for page in pages:
            self._guests.add(page.worker)
            self._fetch(page, keep=True)

    def made(self, storage: UntypedStorage) -> None:
        """Note that the running worker has allocated a storage."""
        if self._worker is None or storage.device != self._device:
            return
        if storage.nbytes() >= SMALLEST and storage.resizable() and self._page(storage) is None:
            self._pages[storage._cdata] = _Page(weakref.ref(storage), self._worker, storage.nbytes())

    def _page(self, storage: UntypedStorage) -> _Page | None:
        page = self._pages.get(storage._cdata)
        return page if page is not None and page.storage() is storage else None

    def _of(self, worker: int) -> list[_Page]:
        return [page for page in self._pages.values() if page.worker == worker]

    def _dismiss(self, all_but: Collection[int] = ()) -> None:
        """Send the guests away again."""
        for worker in self._guests.difference(all_but):
            self._send(worker)
            self._guests.remove(worker)

    @_disable_current_modes()
    def _send(self, worker: int) -> None:
        for page in self._of(worker):
            storage = page.storage()
            if storage is None or not page.here:
                continue
            page.size = storage.nbytes()
            if page.copy is None:
                page.copy = self._copied(storage, page.size)
                self.moved += page.size
                self._away += page.size
                self.peak = max(self.peak, self._away)
            storage.resize_(0)
            page.here = False

    @_disable_current_modes()
    def _fetch(self, page: _Page, *, keep: bool = False) -> None:
        """Fill a storage again; ``keep`` its copy where it will only be read and go again."""
        storage = page.storage()
        if not page.here and storage is not None:
            storage.resize_(page.size)
            storage.copy_(_opened(page.copy, page.size))
            page.here = True
        if page.copy is not None and not keep:
            if isinstance(page.copy, Path):
                page.copy.unlink()
            page.copy = None
            self._away -= page.size

    def _copied(self, storage: UntypedStorage, size: int) -> UntypedStorage | Path:
        if self._folder is None:
            return UntypedStorage(size, device="cpu").copy_(storage)
        path = Path(self._folder.name) / str(self.moved)
        UntypedStorage.from_file(str(path), True, size).copy_(storage)
        return path


class _Watch(TorchDispatchMode):
    """Tells which storages operations read, and which they allocate."""

    def __init__(self, offload: Offload) -> None:
        super().__init__()
        self._offload = offload

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To keep its compiler out of here, PyTorch would import it, which takes seconds; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = _storages((args, kwargs))
        self._offload.need(read.values())
        result = func(*args, **kwargs)
        for key, storage in _storages(result).items():
            if key not in read:  # not a view, not in place
                self._offload.made(storage)
        return result


def _storages(values: Any) -> dict[int, UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


def _opened(copy: UntypedStorage | Path | None, size: int) -> Any:
    assert copy is not None
    return UntypedStorage.from_file(str(copy), False, size) if isinstance(copy, Path) else copy
