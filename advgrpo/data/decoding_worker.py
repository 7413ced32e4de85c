"""A process that decodes images for another: `python -m advgrpo.data.decoding_worker`, started by decoding.py.

In: a line of JSON a job, {"file": ..., "fit": ...}. Out: eight bytes, height and width as little-endian uint32, and as
many RGB bytes row by row; height 0 where the image cannot be decoded, which the caller then finds out itself. Ends with
its input. Imports no torch, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
from pathlib import Path

import numpy as np

from advgrpo.data.images import ImageError, open_image, to_square


def main() -> None:
    """See the module's docstring."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer ends this one
    out = sys.stdout.buffer
    for line in sys.stdin:
        job = json.loads(line)
        try:
            pixels = np.array(to_square(open_image(Path(job["file"])), job["fit"]))
        except ImageError:
            out.write(struct.pack("<II", 0, 0))
        else:
            out.write(struct.pack("<II", *pixels.shape[:2]))
            out.write(pixels.tobytes())
        out.flush()


if __name__ == "__main__":
    main()
