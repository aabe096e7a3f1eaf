"""Follow README.md literally in a fresh environment, and print the wall time of every step.

    python tests/recipes/fresh_environment.py [--keep FOLDER]

It clones this checkout's last commit, makes a virtual environment inside the clone, runs the line that installs, then every
Python block as one program and every other shell line. A step that fails ends it with status 1.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The shell lines read a weight file and an ONNX file, which the reader has; these are the README's own model.
FILES = """
from safetensors.torch import save_file
save_file(dense.state_dict(), "model.safetensors")
sl.export_onnx(dense, batches[0], "model.onnx")
"""


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


def step(title: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
    began = time.monotonic()
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - began:7.2f} s  {'ok' if run.returncode == 0 else 'FAILED'}  {title}", flush=True)
    if run.returncode:
        sys.exit(run.stdout[-2000:] + run.stderr[-4000:])


def follow(folder: Path) -> None:
    clone, work = folder / "slimlstm", folder / "work"
    work.mkdir()
    step("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], folder, dict(os.environ))
    readme = (clone / "README.md").read_text(encoding="utf-8")
    step("python -m venv", [sys.executable, "-m", "venv", str(folder / "venv")], folder, dict(os.environ))
    path = f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"PATH": path}
    lines = [line for block in blocks(readme, "sh") for line in block.splitlines() if line.strip()]
    lines += re.findall(r"`(slimlstm [^`]+)`", readme)
    for line in (line for line in lines if line.startswith("pip ")):
        step(line, shlex.split(line), clone, environment)
    (work / "readme.py").write_text("\n".join([*blocks(readme, "python"), FILES]), encoding="utf-8")
    step("the Python blocks", ["python", "readme.py"], work, environment)
    for line in ("slimlstm --version", "slimlstm --help", "python -m slimlstm --help"):
        step(line, shlex.split(line), work, environment)
    for line in dict.fromkeys(lines):
        if line.startswith("slimlstm "):
            # The blocks above wrote the same names.
            step(line, shlex.split(line) + ["--force"] * (" compress " in line), work, environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which stays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        follow((arguments.keep or Path(scratch)).resolve())


if __name__ == "__main__":
    main()
