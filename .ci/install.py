"""What CI puts in pip's place, because it resolves and unpacks in a third of the time: uv, told what pip is told.

    .venv/bin/python .ci/install.py WHAT...      # as pip install WHAT...

uv reads no settings of pip: neither the index, nor the folder of PyTorch's wheel, nor the constraints that keep a build
with CUDA out. They are read here by pip itself, from its files and its environment, and no setting of uv's own counts.
pip does the work where it has a setting that uv is not told here, where uv would bring CUDA, and where uv fails. A line
says who did it and, if pip, why.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pip._internal.commands import create_command

UV = "uv>=0.13,<0.14"
TOLD = {
    *("index-url", "extra-index-url", "find-links", "constraint", "no-index"),
    *("trusted-host", "cert", "timeout", "default-timeout"),
}
NO_MATTER = {
    *("break-system-packages", "cache-dir", "config-file", "disable-pip-version-check", "no-cache-dir", "no-compile"),
    *("no-input", "no-python-version-warning", "no-warn-script-location", "progress-bar", "quiet", "retries"),
    *("root-user-action", "verbose"),
}


class UsePip(Exception):
    """Why."""


def names_of_settings(python: str) -> set[str]:
    """The settings that pip finds for an installation, without its defaults."""
    lines = subprocess.run([python, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    names = [line.partition("=")[0].rpartition(".")[::2] for line in lines.splitlines()]
    return {name for section, name in names if section in ("global", "install", ":env:")}


def settings_for_uv(python: str) -> tuple[list[str], dict[str, str]]:
    """uv's flags and environment for what pip is set to. `UsePip` names a setting that has no counterpart here."""
    if unknown := names_of_settings(python) - TOLD - NO_MATTER:
        raise UsePip(f"pip's settings {', '.join(sorted(unknown))} are not translated")
    found, _ = create_command("install").parse_args([])
    flags = ["--no-config", "--index-strategy", "unsafe-best-match"]  # pip's: the best version of all indexes
    flags += ["--no-index"] if found.no_index else ["--default-index", found.index_url]
    lists = {
        "--index": found.extra_index_urls,
        "--find-links": found.find_links,
        "--constraints": found.constraints,
        "--allow-insecure-host": found.trusted_hosts,
    }
    flags += [part for flag, values in lists.items() for value in values for part in (flag, value)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    environment["UV_HTTP_TIMEOUT"] = str(round(found.timeout))
    if found.cert:
        environment["SSL_CERT_FILE"] = found.cert
    return flags, environment


def uv_program(python: str, folder: Path) -> str:
    """uv by pip, beside the packages and not among them: nothing that is tested may find it."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--target", str(folder), UV]
    if subprocess.run(command).returncode:
        raise UsePip(f"pip found no {UV}")
    return str(folder / "bin" / "uv")


def refuse_cuda(planned: str) -> None:
    """`planned` is what `uv pip install --dry-run` prints."""
    if cuda := [line[3:] for line in planned.splitlines() if line.startswith((" + nvidia-", " + cuda-"))]:
        raise UsePip(f"uv would bring CUDA: {', '.join(cuda)}")


def by_uv(python: str, what: list[str]) -> None:
    home = Path(sys.prefix) / "uv"
    flags, environment = settings_for_uv(python)
    # On the environment's own disk, so that files are linked and not copied; a machine keeps nothing.
    environment["UV_CACHE_DIR"] = str(home / "cache")
    install = [uv_program(python, home), "pip", "install", "--python", python, *flags]
    plan = subprocess.run([*install, "--dry-run", *what], env=environment, capture_output=True, text=True)
    if plan.returncode:
        raise UsePip(f"uv found no solution: {plan.stderr.strip()}")
    refuse_cuda(plan.stderr)
    print("installing by uv, set as pip is:", *flags, flush=True)
    if subprocess.run([*install, *what], env=environment).returncode:
        raise UsePip("uv failed")


def main(what: list[str]) -> int:
    try:
        by_uv(sys.executable, what)
    except (UsePip, OSError, subprocess.CalledProcessError) as why:
        print(f"installing by pip and not by uv, because {why}", flush=True)
        return subprocess.run([sys.executable, "-m", "pip", "install", "--no-compile", *what]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
