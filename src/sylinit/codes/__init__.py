"""Latent codes: what a layer's units are asked to say about its input.

A code is one of two kinds.

* Linear in the row and its target, ``S = on_x x + on_t t`` (`LinearCode`): it needs second moments only. Its function
  takes `Axes` and is registered with ``needs="moments"``.
* Anything else: its function takes a sample of rows ``x [n, d]`` and returns the code ``s [n, k]``; it is registered
  with ``needs="rows"``.

To add one: write the function, decorate it with `register_code`, add its name to the list in ``tests/test_codes.py``.
"""

from sylinit.codes import fitted
from sylinit.codes.arguments import as_code
from sylinit.codes.linear import HEAD, LinearCode, mixed
from sylinit.codes.registry import CODES, Code, register_code

__all__ = ["CODES", "HEAD", "Code", "LinearCode", "as_code", "fitted", "mixed", "register_code"]
