"""Write an untrained model of a family, every part in miniature, in the hub's layout: `python -m tests.small_models`.

What is trained on it is noise. It shows, before the real weights are downloaded, whether a preset runs where it is to
run: `examples/small_model.yaml` has the settings that pictures of 32 pixels need.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from advgrpo.runtime.libraries import quiet_libraries
from tests import flux2_models, flux_models, qwen_models

FAMILIES = {
    "flux1": flux_models.save_pipeline,
    "flux2": flux2_models.save_pipeline,
    "qwen-image": qwen_models.save_pipeline,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.small_models", description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path, help="a new one")
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"{options.folder} is there already: name another folder, or delete it")
    quiet_libraries()
    FAMILIES[options.family](options.folder)
    command = ["python", "-m", "advgrpo.train", "--preset", f"{options.family}-dino"]
    command += ["--config", "examples/small_model.yaml", "--model.path", str(options.folder)]
    print(shlex.join([*command, "--output-dir", f"{options.folder}-run"]))


if __name__ == "__main__":
    main()
