"""Looking into a cache directory from outside."""

import os
from pathlib import Path

import msgspec
import pytest

from cairn.errors import StorageError
from cairn.tier.disk_directory import RECORD_BYTES
from cairn.tier.inspection import FrameCheck, NamespaceUse, inspect_directory
from tests.tier.rig import GEOMETRY, SLOT_BYTES, namespace, opened, prompt, put
from tests.tier.test_disk_faults import flip


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_tells_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, slots=16) as tier:
        put(tier, prompt(1, 3, salt=b"a"), salt=b"a")
        put(tier, prompt(1, 4))
        busy = inspect_directory(tmp_path)
        assert busy.owner == str(os.getpid())
        assert busy.blocks == 7
    before = contents(tmp_path)
    found = inspect_directory(str(tmp_path), verify=True)
    assert contents(tmp_path) == before
    assert (found.owner, found.geometry, found.slots, found.slot_bytes) == (None, GEOMETRY, 16, SLOT_BYTES)
    assert (found.blocks, found.damaged_records, found.unreachable_records) == (7, 0, 0)
    assert found.frames == FrameCheck(sound=7, damaged=0, changed=0)
    assert 16 * SLOT_BYTES < found.disk_bytes < 17 * SLOT_BYTES + 64 * 1024
    wanted = [NamespaceUse(namespace(b"a").hex(), 3), NamespaceUse(namespace().hex(), 4)]
    assert sorted(found.namespaces, key=repr) == sorted(wanted, key=repr)
    assert msgspec.to_builtins(found)["geometry"]["head_dim"] == 64


def test_counts_damage(tmp_path: Path) -> None:
    keys, other = prompt(1, 4), prompt(2, 4)
    with opened(tmp_path, slots=16) as tier:
        put(tier, keys)
        put(tier, other)
        record = int(tier.slots_of(keys)[1])
        frame = int(tier.slots_of(other)[2])
    flip(tmp_path / "table", record * RECORD_BYTES, 1)
    flip(tmp_path / "data", frame * SLOT_BYTES + 5000, 1)
    found = inspect_directory(tmp_path, verify=True)
    assert (found.damaged_records, found.unreachable_records, found.blocks) == (1, 2, 5)
    assert found.frames == FrameCheck(sound=4, damaged=1, changed=0)


def test_an_owner_at_work_does_not_look_like_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the table and the frames the owner replaces every block."""
    from cairn.tier import inspection

    with opened(tmp_path, slots=4) as tier:
        put(tier, prompt(1, 4))
        read_table = inspection._read_table
        calls = []

        def replace_meanwhile(path: Path, superblock: inspection.Superblock) -> inspection._Held:
            held = read_table(path, superblock)
            if not calls:
                put(tier, prompt(2, 4))
            calls.append(path)
            return held

        monkeypatch.setattr(inspection, "_read_table", replace_meanwhile)
        assert inspect_directory(tmp_path, verify=True).frames == FrameCheck(sound=0, damaged=0, changed=4)


def test_what_is_no_cache_directory_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a cache directory"):
        inspect_directory(tmp_path)
    with pytest.raises(StorageError, match="not a cache directory"):
        inspect_directory(tmp_path / "nowhere")
    (tmp_path / "superblock").write_bytes(b"nonsense")
    with pytest.raises(StorageError, match="damaged"):
        inspect_directory(tmp_path)
