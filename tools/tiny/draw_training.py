"""Draw the loss curves of the shipped models from their training.json files.

python -m tools.tiny.draw_training --output docs/figures/tiny_training.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from advgrpo.runtime.atomic import write_atomically
from advgrpo.tiny import backbone_dir, pipeline_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    curves = {**_read(pipeline_dir()), **_read(backbone_dir())}
    panels = (("vae", "psnr", "VAE: PSNR in dB"), ("flow", "loss", "transformer: flow-matching loss"),
              ("backbone", "loss", "DINOv2: sum of read-out losses"))  # fmt: skip
    figure = Figure(figsize=(12, 3.2), layout="constrained", dpi=100)
    for axes, (name, key, title) in zip(figure.subplots(1, 3), panels):
        rows = curves[name]
        axes.plot([r["step"] for r in rows], [r[key] for r in rows], color="#1f6fb4")
        axes.set(title=f"{title} ({rows[-1]['seconds'] / 60:.0f} min)", xlabel="step")
        axes.grid(alpha=0.25)
    write_atomically(output, lambda file: figure.savefig(file, format=output.suffix[1:]))
    print(f"wrote {output}")


def _read(folder: Path) -> dict[str, list[dict]]:
    return {k: v for k, v in json.loads((folder / "training.json").read_text()).items() if isinstance(v, list)}


if __name__ == "__main__":
    main()
