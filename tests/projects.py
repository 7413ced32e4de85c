"""What the pyproject files say, for the tests that hold other files to it."""

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
