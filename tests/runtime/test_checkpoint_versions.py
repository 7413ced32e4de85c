"""Which checkpoints are read, and that a finished one survives a power cut.

Bugs planted in a copy, each seen red: an older version taken for the current one; a manifest without a version; the
folder of the checkpoints not synced after the rename; files renamed into place before they were synced.
"""

import json
import os

import pytest
import torch

from advgrpo.errors import UserError
from advgrpo.runtime.checkpoint import MANIFEST, STATE, TENSORS, VERSION, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, str(VERSION), None])
def test_only_the_current_version_is_read(tmp_path, version):
    """An older program's tensors mean something else, even where their names are the same; None: no version at all."""
    path = save_checkpoint(tmp_path, 1, {"a": torch.zeros(2)}, {}, keep=1)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest = {key: value for key, value in {**manifest, "version": version}.items() if value is not None}
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"checkpoint version {version!r}, this program reads {VERSION}"):
        load_checkpoint(path)


def test_what_is_renamed_into_place_is_on_the_disk_and_so_is_the_name(tmp_path, monkeypatch):
    """A rename that only the cache knows of would leave no checkpoint, or an empty one, after a power cut."""
    final, synced, real = tmp_path / "iteration-000001", [], os.fsync

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, final.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert save_checkpoint(tmp_path, 1, {"a": torch.zeros(2)}, {}, keep=1) == final
    number = {path: path.stat().st_ino for path in (tmp_path, final, *final.iterdir())}
    assert {path.name for path in final.iterdir()} == {TENSORS, STATE, MANIFEST}
    for path in (final, *final.iterdir()):
        assert (number[path], False) in synced, path.name
    assert (number[tmp_path], True) in synced
