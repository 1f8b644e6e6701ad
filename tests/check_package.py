"""Build wheel and sdist, install them into an empty environment, and run the quickstart there.

Run by `make package`; takes some minutes, most of them to install torch. Arguments go to pip, such as
``--constraint requirements.lock``, which is the default.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def quickstart() -> str:
    """The code of the notebook, with a check that nothing of the checkout is imported."""
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return ast.unparse(ast.parse(code)) + (
        "\nimport sys\nassert sylinit.__file__.startswith(sys.prefix), sylinit.__file__\n"
        "print(report.headline())\nprint(result)\n"
    )


def main() -> None:
    """Build, install, run; any failure ends with its exit code."""
    pip_options = sys.argv[1:] or ["--constraint", str(ROOT / "requirements.lock")]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

        def run(*command: str | Path) -> None:
            print("$", *command, flush=True)
            subprocess.run([str(word) for word in command], cwd=place, env=environment, check=True)

        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "--directory", place / "dist"], cwd=ROOT, check=True
        )
        wheel, sdist = (next((place / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
        venv.create(place / "env", with_pip=True)
        python = place / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        run(python, "-m", "pip", "install", "--quiet", *pip_options, f"{wheel}[cli]")
        (place / "quickstart.py").write_text(quickstart(), encoding="utf-8")
        run(python, "quickstart.py")
        run(python, "-m", "sylinit", "init", "mlp", "--data", "digits")
        run(python, "-m", "sylinit", "info", "weights.safetensors")
        run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "again", sdist)
        again = next((place / "again").glob("*.whl"))
        names = [set(zipfile.ZipFile(each).namelist()) for each in (wheel, again)]
        assert names[0] == names[1], names[0] ^ names[1]
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", again)
        run(python, "quickstart.py")
    print("wheel and sdist install and run")


if __name__ == "__main__":
    main()
