"""Tensors of a checkpoint that lie in parts on several processes, by PyTorch's distributed checkpointing (DCP).

    root/iteration-000123/shard-00001-model-00001-of-00002.safetensors   process 0's rows, in files of at most 4 GB
                          shard-00002-model-00001-of-00002.safetensors   process 1's

Every process writes its own rows, and reads those that are its own among as many processes as there are then, from
whichever files have them: DCP finds them by what the files' headers say of where rows begin. A process plans for itself
(`no_dist`), since DCP's messages between processes are pickles, and nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from advgrpo.errors import UserError
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.reading import failed_read

PART = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Cut:
    """Which rows of tensors in parts are a process's: as `torch.chunk`, and FSDP2, cut the first dimension.

    Args:
        rank, processes: the process, of how many.
        in_parts: name of a tensor -> whether it is cut; each process has all of another.
    """

    rank: int
    processes: int
    in_parts: Callable[[str], bool]

    def of(self, rows: int) -> range:
        """This process's of so many; none, where others have them all."""
        each = math.ceil(rows / self.processes)
        return range(min(self.rank * each, rows), min((self.rank + 1) * each, rows))


def write_together(
    folder: Path | None,
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, int],
    cut: Cut,
    distributed: Distributed,
    *,
    within_seconds: float,
) -> dict[str, dict[str, Any]]:
    """Every process's rows, written into one folder; called by all of them, and returns what to say of all files.

    Args:
        folder: given by process 0, and there.
        tensors: this process's rows.
        rows: of the whole of each tensor.
        within_seconds: how long a process may take to write its rows, and process 0 for what is left to do then.

    Raises:
        UserError: one of them could not write; on all processes.
    """
    with distributed.monitored("make room for a checkpoint"):
        pass
    place = Path(distributed.gather_json(None if folder is None else str(folder))[0])
    with distributed.monitored("write the parts", at_most_seconds=within_seconds):
        try:
            found: Any = {file.name: described_file(file) for file in _write(place, tensors, rows, cut)}
        except OSError as error:
            found = str(error)
    described: dict[str, dict[str, Any]] = {}
    for rank, files in enumerate(distributed.gather_json(found)):
        if isinstance(files, str):
            raise UserError(
                f"output_dir: process {rank} cannot write its part of a checkpoint in {place.parent} ({files}); make "
                "room there, or name a folder that every machine may write to. Older checkpoints are as they were"
            )
        described |= files
    if folder is not None:
        _refuse_absent(place, described)
        distributed.progress("finish a checkpoint", within_seconds=within_seconds)  # the others wait for it
    return described


def described_file(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def sha256_of(file: Path) -> str:
    """Of its content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(folder: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, int], cut: Cut) -> list[Path]:
    """This process's files, of which there are none where others have all rows."""
    held = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if held:
        from advgrpo.runtime.checkpoint_dcp import write_rows

        write_rows(folder, held, rows, cut)
    return sorted(folder.glob(f"shard-{cut.rank + 1:05d}-*.safetensors"))


def _refuse_absent(folder: Path, described: Mapping[str, Any]) -> None:
    absent = [name for name in described if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"output_dir: {folder / absent[0]}, which another process has written, is not there; name a folder that "
            "all machines share"
        )


def read_parts(folder: Path, names: list[str], cut: Cut | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint's safetensors files, on the CPU; of those in parts this process's rows.

    Without `cut` all rows.

    Raises:
        ValueError: naming the file: it is no safetensors file, or none of `names`; or the parts are not whole.
        OSError: a file is there and could not be read.
    """
    stray = {file.name for file in folder.glob("*.safetensors")} - {*names}
    if stray:
        raise ValueError(f"{folder / min(stray)} is another checkpoint's: the manifest does not list it")
    for name in names:
        try:
            with safetensors.safe_open(folder / name, framework="pt"):
                pass
        except Exception as error:  # a header can promise anything, and what then fails is not for us to list
            raise failed_read(error) or ValueError(f"{folder / name} is no safetensors file ({error})") from None
    from advgrpo.runtime.checkpoint_dcp import read_rows

    try:
        return read_rows(folder, cut)
    except Exception as error:  # as above
        raise failed_read(error) or ValueError(f"the parts in {folder} do not fit together ({error})") from None
