"""What `import sylinit` adds to `import torch`, in fresh interpreters: seconds, and which packages.

    python benchmarks/importing.py [--repeats 9]

At most 0.15 s is the aim. Prints the median; the first interpreter, which may still compile, does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

PROGRAM = """
import json, sys, time
import torch
before, started = set(sys.modules), time.perf_counter()
import sylinit
taken = time.perf_counter() - started
print(json.dumps([taken, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    found = [
        json.loads(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
        for _ in range(given.repeats + 1)
    ]
    seconds = [taken for taken, _ in found[1:]]
    print(f"{median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f}); imported: {', '.join(found[-1][1])}")


if __name__ == "__main__":
    main()
