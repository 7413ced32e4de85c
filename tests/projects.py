"""What the pyproject files say, for the tests that hold other files to it.

python -m tests.projects dev > newest.txt    # what an extra needs, without upper bounds: is the newest still good?
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KERNELS = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())


def requirements(project: dict, extra: str = "") -> dict[str, Requirement]:
    """By name: what it always needs, or what one of its extras adds."""
    lines = project["project"]["optional-dependencies"][extra] if extra else project["project"]["dependencies"]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


def all_requirements(project: dict) -> dict[str, Requirement]:
    """By name, those of every extra included, but not the project itself."""
    extras = project["project"].get("optional-dependencies", {})
    found = {name: each for extra in ("", *extras) for name, each in requirements(project, extra).items()}
    found.pop(project["project"]["name"], None)
    return found


def without_upper_bounds(project: dict, extra: str) -> list[str]:
    """What the project with this extra needs, as lines for pip; upper bounds and pins are left out."""
    wanted, waiting = dict(requirements(project)), [extra]
    while waiting:
        for name, each in requirements(project, waiting.pop()).items():
            if name == project["project"]["name"]:
                waiting += each.extras
            else:
                wanted[name] = each
    lines = []
    for name, each in wanted.items():
        bounds = ",".join(str(s) for s in each.specifier if s.operator in (">=", ">", "!="))
        lines.append(f"{name}{bounds}" + (f"; {each.marker}" if each.marker else ""))
    return lines


if __name__ == "__main__":
    print("\n".join(without_upper_bounds(PROJECT, sys.argv[1])))
