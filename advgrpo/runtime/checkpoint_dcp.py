"""What checkpoint_parts.py tells PyTorch's distributed checkpointing (DCP): which rows to write where, and to read.

Apart from it since DCP takes a second to import.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from advgrpo.runtime.checkpoint_parts import Cut

_FILE_BYTES = 4 * 10**9  # DCP makes a file in memory before it writes it


def write_rows(folder: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, int], cut: Cut) -> None:
    """Write this process's rows into the folder, which is there, in files of its own.

    Args:
        tensors: of any dtype and device, not empty; stored on the CPU, bit for bit.
        rows: of the whole of each.

    Raises:
        OSError: one of them could not be written.
    """
    writer = _Writer(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    writer.place = cut.rank
    with _alone():
        dcp.save(dict(tensors), storage_writer=writer, planner=_Writes(rows, cut), no_dist=True)


def read_rows(folder: Path, cut: Cut | None) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, on the CPU; of those in parts this process's rows.

    Without `cut` all rows.

    Raises:
        ValueError: rows of a tensor are in no file, or in two.
        Exception: whatever DCP and safetensors raise for files that are none of theirs.
    """
    reader = HuggingFaceStorageReader(str(folder))
    found, starts = {}, {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        _check_rows(name, stored)
        shape, start = list(stored.size), 0
        if cut is not None and shape and cut.in_parts(name):
            own = cut.of(shape[0])
            start, shape[0] = own.start, len(own)
        found[name], starts[name] = torch.empty(shape, dtype=stored.properties.dtype), start
    with _alone():
        dcp.load(found, storage_reader=reader, planner=_Reads(starts), no_dist=True)
    return found


def _check_rows(name: str, stored: TensorStorageMetadata) -> None:
    """DCP would leave rows that no file has as they happen to be."""
    chunks = sorted(stored.chunks, key=lambda chunk: list(chunk.offsets))
    following = 0
    for chunk in chunks if len(stored.size) else ():
        if chunk.offsets[0] != following or chunk.sizes[1:] != stored.size[1:]:
            raise ValueError(f"rows of {name} from {following} are in no file, or in two")
        following += chunk.sizes[0]


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, of each tensor."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += tensor.nbytes
    return numbers


@contextmanager
def _alone() -> Iterator[None]:
    """DCP warns of what is asked for; what fails in it is an exception like others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise reason if isinstance(reason, Exception) else error from error


class _Writer(HuggingFaceStorageWriter):
    """Files by the names that this process has among all, which DCP takes for the only one."""

    place = 0

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        (plan,) = super().prepare_global_plan(plans)
        return [replace(plan, storage_data={**plan.storage_data, "shard_index": self.place + 1})]


class _Writes(SavePlanner):
    """What this process writes: its rows, at their place in the whole."""

    def __init__(self, rows: Mapping[str, int], cut: Cut):
        self._rows, self._cut = rows, cut

    def set_up_planner(
        self, state_dict: dict[str, Tensor], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(name, tensor) for name, tensor in self._tensors.items()])

    def _item(self, name: str, tensor: Tensor) -> WriteItem:
        rows, others = self._rows[name], tensor.shape[1:]
        own = self._cut.of(rows)
        if len(own) != len(tensor):
            raise ValueError(f"{name} has {len(tensor)} of {rows} rows on process {self._cut.rank}, not {len(own)}")
        offsets = torch.Size([own.start, *(0 for _ in others)])
        chunk = ChunkStorageMetadata(offsets, tensor.shape)
        whole = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), torch.Size([rows, *others]))
        return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=whole)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._tensors[write_item.index.fqn].detach()


class _Reads(LoadPlanner):
    """What this process reads: rows of each tensor from `starts` on, as many as there is room for."""

    def __init__(self, starts: Mapping[str, int]):
        self._starts = starts

    def set_up_planner(
        self, state_dict: dict[str, Tensor], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._tensors, self._stored = state_dict, metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, tensor in self._tensors.items():
            offsets = [0] * tensor.dim()
            if offsets:
                offsets[0] = self._starts[name]
            wanted = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
            items += create_read_items_for_chunk_list(name, self._stored[name], [wanted] if tensor.numel() else [])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise TypeError(f"{read_item.storage_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self._tensors[read_item.dest_index.fqn]
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            place = place.narrow(dimension, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was read into its place."""
