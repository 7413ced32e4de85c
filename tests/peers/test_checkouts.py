"""Cloning the peers at their commits, from a repository on this disk, and what is said where there is no checkout.

Planted bugs that turned this file red: the branch's tip instead of the commit, cloned again every time, a missing
checkout that fails, stubs that other packages see.
"""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

from tests.peers import checkouts


def git(folder, *command):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_checkout_is_at_its_commit_and_is_made_once(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    source.mkdir()
    git(source, "init", "--quiet")
    git(source, "config", "uploadpack.allowAnySHA1InWant", "true")
    for content in ("first", "second"):
        (source / "code.py").write_text(content)
        git(source, "add", "code.py")
        git(source, "commit", "--quiet", "--message", content)
    commit = git(source, "rev-parse", "HEAD~1")
    monkeypatch.setattr(checkouts, "COMMITS", {"peer": {"repository": str(source), "commit": commit}})
    checkouts.clone(tmp_path / "peers")
    assert (tmp_path / "peers/peer/code.py").read_text() == "first"
    assert capsys.readouterr().out == f"peer {commit}\n"
    checkouts.clone(tmp_path / "peers")
    assert capsys.readouterr().out == ""


def test_without_a_checkout_a_test_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("ADVGRPO_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"ADVGRPO_PEERS is not set: .*`make peers` makes one"):
        checkouts.checkout("flow_grpo")
    monkeypatch.setenv("ADVGRPO_PEERS", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="has no checkout of Adv-GRPO"):
        checkouts.checkout("adv_grpo")


@pytest.mark.parametrize(
    ("integration", "words", "where"),
    [
        ("mix_grpo", "qwen", []),
        ("flow_grpo", "fluxpipeline|fluxtransformer|qwenimage", []),
        ("verl_omni", "fluxpipeline|fluxtransformer", ["examples/diffusionnft_trainer/minimax_h3/gen_flux_images.py"]),
    ],
)
def test_models_that_a_peer_has_not_are_in_none_of_its_files(integration, words, where):
    """What kernels/README.md says of them, at these commits."""
    folder, kinds = checkouts.checkout(integration), {".py", ".sh", ".yaml", ".yml", ".md", ".toml"}
    texts = {path: path.read_text(errors="replace") for path in folder.rglob("*") if path.suffix in kinds}
    found = [path for path, text in texts.items() if re.search(words, text, re.IGNORECASE)]
    assert [str(path.relative_to(folder)) for path in sorted(found)] == where
    assert any(re.search("sd3|stablediffusion3", text, re.IGNORECASE) for text in texts.values())


def test_every_commit_belongs_to_a_recipe_and_is_a_full_one():
    assert set(checkouts.COMMITS) == {recipe.folder for recipe in checkouts.RECIPES.values()}
    for entry in checkouts.COMMITS.values():
        assert entry["repository"].startswith("https://github.com/")
        assert len(bytes.fromhex(entry["commit"])) == 20


def test_stubs_are_for_the_peer_s_code_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVGRPO_PEERS", str(tmp_path))
    monkeypatch.setattr(checkouts, "STUBS", {"absent_package"})
    source = "from absent_package.part import thing\nclass Child(thing): pass\nimport absent_package as whole\n"
    package = tmp_path / "flow_grpo/flow_grpo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "code.py").write_text(source)
    with checkouts.importable("flow_grpo", ["flow_grpo.code"]) as (module,):
        assert module.whole.anything("x") is not None
        assert importlib.util.find_spec("absent_package_of_others") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("absent_package.other")
    assert "flow_grpo.code" not in sys.modules
    assert "absent_package" not in sys.modules
