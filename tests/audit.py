"""Compare the packages that we ask for with versions that are known to be safe; `make audit` also asks a service.

The table stands in pyproject.toml, [tool.distilclip.safe-versions]. Services of known vulnerabilities need a network:
`pip-audit` is asked where it is installed, and what it cannot answer is said.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def safe_versions() -> dict[str, tuple[Version, str]]:
    """Return the oldest safe version of each package of the table, and why it is."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["distilclip"]["safe-versions"]
    return {name: (Version(version), why) for name, (version, why) in table.items()}


def lower_bounds() -> dict[str, Version]:
    """Return the lower bounds of pyproject.toml's dependencies, with those of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {}
    for requirement in (Requirement(line) for lines in lists for line in lines):
        bounds = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==")]
        if bounds:
            found[requirement.name.lower()] = max(bounds)
    return found


def pinned() -> dict[str, Version]:
    """Return the versions of constraints.txt."""
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {name.lower(): Version(version) for name, version in lines}


def unsafe(versions: dict[str, Version]) -> list[str]:
    """Say which of some packages are older than the table allows, and why that matters."""
    return [
        f"{name} {versions[name]} is older than {safe}: {why}"
        for name, (safe, why) in safe_versions().items()
        if name in versions and versions[name] < safe
    ]


def main() -> int:
    """Print what the table says, then what the service says; 1 where something is unsafe."""
    known, faults = pinned(), [*unsafe(pinned()), *unsafe(lower_bounds())]
    print(f"{len(safe_versions())} packages have a lowest safe version; constraints.txt has {len(known)} packages.")
    print("\n".join(faults) or "None is older than that.")
    if shutil.which("pip-audit") is None:
        print("pip-audit is not installed (uv tool install pip-audit), so no service was asked.")
        return bool(faults)
    command = ["pip-audit", "--strict", "--no-deps", "--disable-pip", "-r", str(ROOT / "constraints.txt")]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    print(asked.stdout + asked.stderr)
    print("pip-audit found nothing." if asked.returncode == 0 else "pip-audit found something, or had no answer.")
    return bool(faults) or asked.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
