"""Our kernels compiled for a GPU that is not here: `python -m bench.warm_cache --out FILE.tar.gz` (make gpu-carry).

Runs the launchers themselves on meta tensors at SD3.5-medium's shapes, in the token-major layouts of the model, with a
stand-in for Triton's driver that names sm_90: each launch is compiled into Triton's cache instead of launched. What the
cache needs to be found (binaries and their metadata) is packed; `unpack` puts it where another machine looks, if that
machine has the very same Triton: its version and files are part of every key, so a cache of another one is never read.

Run it with the Python and Triton of the machine it is for. `--check FILE`, in another process, unpacks an archive into
an empty folder and fails if anything has to be compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch

from advgrpo.policy.fused.transformer import FusedTransformer, TransformerConfig

from . import counters
from .registry import REGISTRY
from .stock_model import LORA_TARGETS, SD35_MEDIUM, StockTransformer
from .workload import SD35_MEDIUM_512, Bench

ARCHITECTURE = 90
PACKED = (".cubin", ".json")
UNTRACED = ("group_advantages", "merge_lora", "multi_tensor_adamw")  # read values, or are csrc/'s
TEXT, STEPS = 205, 10


class Target:
    """What Triton asks its driver for before it would launch."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Meta(Bench):
    """Shapes without data, in a GPU's dtypes."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


@contextlib.contextmanager
def compiling(into: Path) -> Generator[list[str], None, None]:
    """Inside, a launch of ours on meta tensors compiles into `into`; the names of what was asked for."""
    import triton
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    run = JITFunction.run

    def compile_only(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs | {"warmup": True})

    @contextlib.contextmanager
    def replaced(seen: Callable[[str], None]) -> Generator[None, None, None]:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield

    triton.runtime.driver.set_active(Target())
    with (
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(into)),
        mock.patch.object(counters, "_kernels_replaced", replaced),
    ):
        yield launched


def trace() -> None:
    """Every case of the registry, and forward, backward and FP8 forward of the model, at one and eight images."""
    with counters.on_gpu():
        for rollout in (SD35_MEDIUM_512.rollout, SD35_MEDIUM_512.train):
            bench = Meta(replace(SD35_MEDIUM_512, rollout=rollout), "meta")
            for op in REGISTRY.values():
                for build in op.cases.values() if op.name not in UNTRACED else ():
                    workload = build(bench)
                    with counters.Launches():
                        workload.ours()
        for fp8 in (False, True):
            _trace_model(fp8)


def _trace_model(fp8: bool) -> None:
    """Two blocks with the second attention and one without are all kinds of launches there are."""
    config = replace(SD35_MEDIUM, num_layers=4, dual_attention_layers=(0, 1))
    with torch.device("meta"):
        stock = StockTransformer(config).to(torch.bfloat16).requires_grad_(False)
    tensors = {name: t.detach() for name, t in [*stock.named_parameters(), *stock.named_buffers()]}
    model = FusedTransformer(TransformerConfig.from_stock(asdict(config)), tensors, stock=stock, attention="math")
    model._attend = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    targets = tuple(f".attn.{target}" for target in LORA_TARGETS)
    model.adapt(lambda name: name.endswith(targets), rank=32, alpha=64, init="gaussian", seed=0)
    model.prepare_merged(fp8=fp8)
    step = torch.zeros(1, dtype=torch.int64, device="meta")
    for rows in (16, 2):
        latents = torch.empty(rows, 16, 64, 64, device="meta")
        shapes = (2, TEXT, 4096), (2, 2048)
        text, pooled = (torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in shapes)
        prepared = model.prepare(text, pooled, torch.empty(STEPS, device="meta"))
        prepared = prepared.rows(torch.zeros(rows, dtype=torch.int64, device="meta"))
        with counters.Launches():
            with torch.no_grad():
                model.predict(latents, step, prepared, "merged")
                model.predict(latents, step, prepared, "adapted")
            velocity = model.predict(latents, step, prepared, "adapted")
            velocity.backward(torch.empty_like(velocity))


def pack(cache: Path, archive: Path) -> int:
    """What of a cache another machine needs, compressed; returns the number of entries."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    entries = sorted(folder for folder in cache.iterdir() if any(folder.glob("*.cubin")))
    with tarfile.open(archive, "w:gz") as packed:
        for folder in entries:
            for file in sorted(path for path in folder.iterdir() if path.suffix in PACKED):
                text = file.read_bytes()
                if file.name.startswith("__grp__"):  # absolute paths of this machine: names of the same folder instead
                    group = json.loads(text)
                    group["child_paths"] = {name: name for name in group["child_paths"] if Path(name).suffix in PACKED}
                    text = json.dumps(group).encode()
                member = tarfile.TarInfo(f"{folder.name}/{file.name}")
                member.size = len(text)
                packed.addfile(member, io.BytesIO(text))
    return len(entries)


def misses(archive: Path) -> list[str]:
    """Kernels that are compiled anew although the archive's cache is there."""
    from .gpu_session import unpack_cache

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "triton"
        unpack_cache(archive, cache)
        known = {path.name for path in cache.iterdir()}
        with compiling(cache):
            trace()
        fresh = [path for path in cache.iterdir() if path.name not in known]
        return sorted(file.stem for path in fresh for file in path.glob("*.cubin"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.warm_cache", description=__doc__.split("\n\n")[0])
    # One at a time: what a process has compiled it keeps, and never asks an archive for it.
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="write the archive")
    what.add_argument("--check", type=Path, metavar="FILE", help="unpack it elsewhere: nothing may be compiled again")
    args = parser.parse_args(argv)
    if args.out:
        with tempfile.TemporaryDirectory() as folder, compiling(Path(folder)) as launched:
            trace()
            entries = pack(Path(folder), args.out)
        print(f"{args.out}: {entries} kernels of {len(launched)} launches, {args.out.stat().st_size / 2**20:.1f} MiB")
    if args.check:
        if again := misses(args.check):
            print(f"compiled again: {', '.join(again)}")
            return 1
        print(f"{args.check}: nothing is compiled again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
