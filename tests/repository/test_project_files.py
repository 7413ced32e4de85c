"""One version everywhere, a lock file that is current, hooks that are the linter, and a citation that can be read.

Bugs planted in a copy, each seen red: another version in kernels/pyproject.toml, advgrpo_kernels and CITATION.cff; a
dependency, and a bound, that uv.lock does not know; a package from another index in it; a hook with another ruff; a
citation without a year.
"""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import advgrpo
import advgrpo_kernels
from tests.projects import KERNELS, PROJECT, ROOT, all_requirements, requirements

VERSION = PROJECT["project"]["version"]
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_one_version():
    assert str(Version(VERSION)) == VERSION
    others = (advgrpo.__version__, advgrpo_kernels.__version__, KERNELS["project"]["version"], CITATION["version"])
    assert others == (VERSION,) * 4


def test_the_changelog_is_at_this_version():
    """The newest section is this version, or unreleased and says that it becomes this version."""
    text = (ROOT / "CHANGELOG.md").read_text()
    title, section = re.search(r"^## \[(.+?)\](.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).groups()
    assert title == VERSION or (title == "Unreleased" and VERSION in section)


def test_the_lock_knows_every_requirement():
    """As far as can be told without an index; `uv lock --check` is CI's."""
    packages = {package["name"]: package for package in LOCK["package"]}
    found = set()
    for entry in packages["advgrpo"]["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '(\w+)'", entry.get("marker", ""))
        bounds = Requirement(entry["name"] + entry.get("specifier", "")).specifier
        found.add((entry["name"], str(bounds), extra[1] if extra else ""))
    wanted = {
        (name, str(each.specifier), extra)
        for extra in ("", *PROJECT["project"]["optional-dependencies"])
        for name, each in requirements(PROJECT, extra).items()
    }
    assert found == wanted
    assert LOCK["requires-python"] == PROJECT["project"]["requires-python"]
    for name, each in all_requirements(PROJECT).items():
        assert Version(packages[name]["version"]) in each.specifier


def test_what_is_locked_comes_from_pypi_with_hashes():
    for package in LOCK["package"]:
        if package["name"] == "advgrpo":
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else ())]
        assert files
        assert all(file["url"].startswith("https://files.pythonhosted.org/") for file in files)
        assert all(file["hash"].startswith("sha256:") for file in files)


def test_the_hooks_are_the_linters_of_the_project():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    known = {each.name: str(each) for each in requirements(PROJECT, "dev").values()}
    hooks = {hook["id"]: hook["additional_dependencies"] for hook in repository["hooks"]}
    assert {"ruff", "ruff-format", "codespell", "end-of-file"} <= set(hooks)
    for wanted in hooks.values():
        for each in map(Requirement, wanted):
            assert known.get(each.name, str(each)) == str(each)
    assert hooks["ruff"] == hooks["ruff-format"]
    assert Requirement(*hooks["ruff"]).name in known


def test_the_citation_is_complete():
    """What version 1.2.0 of the format requires, and the paper of the method."""
    assert CITATION["cff-version"] == "1.2.0"
    assert all(CITATION[key] for key in ("message", "title", "authors"))
    assert CITATION["license"] == PROJECT["project"]["license"]
    (paper,) = CITATION["references"]
    assert paper["type"] == "article"
    assert paper["year"] == 2025
    assert "2511.20256" in paper["url"]
    for author in [*CITATION["authors"], *paper["authors"]]:
        assert set(author) in ({"name"}, {"given-names", "family-names"})


@pytest.mark.parametrize("name", ["SECURITY.md", "CHANGELOG.md", "CITATION.cff", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_the_files_that_hosts_look_for_are_there(name):
    assert (ROOT / name).read_text().strip()
