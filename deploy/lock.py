"""Write what the image installs, with versions and hashes: `make lock`.

`requirements.lock` holds everything but torch, of which there is one build for CPUs and others for GPUs.
`torch-cuda.lock` holds PyPI's torch for Linux, which is the one for NVIDIA's GPUs, and what only that needs.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("lora", "gguf", "ledger")
BUILD = "setuptools>=77"  # builds our own two packages in the image
OF_TORCH = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
HEADER = "# Made by `make lock` from pyproject.toml, for Python 3.11 on Linux. Do not edit.\n"


def main() -> None:
    """Resolve, and split by what torch alone needs. Raises CalledProcessError if there is no solution."""
    packages = split(resolve())
    torch = [package for package in packages if OF_TORCH.match(package)]
    for name, found in (
        ("requirements", [package for package in packages if package not in torch]),
        ("torch-cuda", torch),
    ):
        (ROOT / "deploy" / f"{name}.lock").write_text(HEADER + "".join(found))
        print(f"deploy/{name}.lock: {len(found)} packages")


def resolve() -> str:
    """Name, version and hashes of every package, as `uv` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        build, constraints = Path(folder, "build.txt"), Path(folder, "constraints.txt")
        build.write_text(BUILD)
        constraints.write_text((ROOT / "constraints.txt").read_text().replace("${PWD}", str(ROOT)))
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", str(build), "-c", str(constraints)]
        command += ["--python-version=3.11", "--python-platform=x86_64-unknown-linux-gnu", "--generate-hashes"]
        command += ["--no-emit-package=gradient-selectors", "--no-header", "--no-annotate", "--quiet", "--upgrade"]
        command += [f"--extra={extra}" for extra in EXTRAS]
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def split(lock: str) -> list[str]:
    """One text for each package: its first line, and those of its hashes."""
    return re.findall(r"^[a-z0-9][^\n]*\n(?:[ ]{4}[^\n]*\n)*", lock, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
