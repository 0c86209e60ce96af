"""A checkpoint is whole or absent, and a damaged one is noticed before it is used."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oriole.errors import CheckpointError, ResourceError
from oriole.train import checkpoint

CPU = torch.device("cpu")


def write(root: Path, step: int, keep: int = 3) -> Path:
    tensors = {"model": {"w": torch.full((3, 4), float(step))}, "optimizer": {"w.step": torch.tensor(float(step))}}
    return checkpoint.save(root, step, tensors, {"note": f"春{step}"}, checkpoint.Keep(keep))


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path == tmp_path / "step-7"
    found = checkpoint.load(path)
    assert (found.path, found.step, found.state["note"]) == (path, 7, "春7")
    assert torch.equal(found.tensors["model"]["w"], torch.full((3, 4), 7.0))
    assert found.tensors["optimizer"]["w.step"].shape == ()
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    assert {p.suffix for p in write(tmp_path, 1).iterdir()} == {".safetensors", ".json"}


def test_newest_are_kept_and_later_ones_of_an_abandoned_branch_removed(tmp_path: Path) -> None:
    for step in (5, 10, 100, 15):  # 100, then resumed from 10 on
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-10", "step-15"]


def test_the_best_and_every_so_many_stay_beside_the_newest(tmp_path: Path) -> None:
    scores = {10: 3.0, 20: 1.5, 30: None, 40: 2.0, 50: math.nan, 60: 2.5, 70: None, 80: 2.0}
    for step, score in scores.items():
        tensors = {"model": {"w": torch.zeros(1)}}
        checkpoint.save(tmp_path, step, tensors, {"score": score}, checkpoint.Keep(last=1, best=2, every=30))
    assert names(tmp_path) == ["step-20", "step-30", "step-40", "step-60", "step-80"]


def test_a_damaged_state_has_no_score_and_hinders_nobody(tmp_path: Path) -> None:
    keep = checkpoint.Keep(last=1, best=1)
    for step, score in ((1, 1.0), (2, 3.0)):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.zeros(1)}}, {"score": score}, keep)
    assert names(tmp_path) == ["step-1", "step-2"]
    (tmp_path / "step-1" / "state.json").write_text('{"score": 1.0')
    checkpoint.save(tmp_path, 3, {"model": {"w": torch.zeros(1)}}, {"score": 4.0}, keep)
    assert names(tmp_path) == ["step-2", "step-3"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 4)
    checkpoint.save(tmp_path, 4, {"model": {"w": torch.zeros(1)}}, {"note": "new"})
    assert names(tmp_path) == ["step-4"]
    assert checkpoint.load(tmp_path / "step-4").state["note"] == "new"


def test_none_yet(tmp_path: Path) -> None:
    assert checkpoint.latest_valid(tmp_path / "absent") is None
    assert checkpoint.latest_valid(tmp_path) is None


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_file_means_the_previous_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 0x01
            path.write_bytes(content)
        case "truncate":
            path.write_bytes(content[:-3])
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
    with pytest.raises(CheckpointError, match=r"step-2"):
        checkpoint.load(tmp_path / "step-2")
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.step == 1
    assert float(found.tensors["model"]["w"][0, 0]) == 1
    said = capfd.readouterr().err
    assert "step-2 is not used" in said


def test_every_flipped_bit_of_the_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = write(tmp_path, 3) / "manifest.json"
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = checkpoint.load(tmp_path / "step-3")
        except CheckpointError:
            continue
        assert found.step == 3 and torch.equal(found.tensors["model"]["w"], torch.full((3, 4), 3.0))


def test_when_all_are_damaged_nothing_is_started_afresh_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* train\.resume=no"):
        checkpoint.latest_valid(tmp_path)


def test_another_schema_is_refused_by_number(tmp_path: Path) -> None:
    path = write(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(CheckpointError, match="schema 99"):
        checkpoint.load(path.parent)


def test_half_written_ones_are_ignored_and_cleaned(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-2.tmp").mkdir()
    (tmp_path / "step-2.tmp" / "model.safetensors").write_bytes(b"half")
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.step == 1
    assert names(tmp_path) == ["step-1"]


KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pathlib import Path
from oriole.train import checkpoint
real, left = os.fsync, [int(sys.argv[2])]
def fsync(fd):
    left[0] -= 1
    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
    real(fd)
os.fsync = fsync
for step in (1, 2):
    checkpoint.save(Path(sys.argv[1]), step, {"model": {"w": torch.full((2,), float(step))}}, {})
"""


@pytest.mark.parametrize("at", [5, 8, 9])
def test_a_kill_while_saving_leaves_the_previous_one(tmp_path: Path, at: int) -> None:
    # Five flushes a checkpoint: tensors, state, manifest, folder, parent.
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), str(at)], timeout=60)
    assert done.returncode == -9
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None
    assert found.step == (2 if at == 9 else 1)  # the last flush comes after the rename
    assert torch.equal(found.tensors["model"]["w"], torch.full((2,), float(found.step)))


def test_a_kill_between_the_two_renames_of_the_same_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def second(source: Path, target: Path, real: Any = os.replace) -> None:
        if target.name == "step-4":
            raise Killed
        real(source, target)

    write(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second)
        with pytest.raises(Killed):
            write(tmp_path, 4)
    assert names(tmp_path) == ["step-4.old.tmp", "step-4.tmp"]
    found = checkpoint.latest_valid(tmp_path)
    assert found is not None and found.step == 4 and names(tmp_path) == ["step-4"]


def test_a_full_disk_is_a_resource_error_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"disk is full while saving the checkpoint .*step-2"):
            write(tmp_path, 2)
    assert names(tmp_path) == ["step-1"]
    assert checkpoint.load(tmp_path / "step-1").step == 1


ON_A_SMALL_DISK = """
import sys, torch
from pathlib import Path
from oriole.errors import ResourceError
from oriole.train import checkpoint
root = Path(sys.argv[1])
checkpoint.save(root, 1, {"model": {"w": torch.zeros(1000)}}, {})
try:
    checkpoint.save(root, 2, {"model": {"w": torch.zeros(1_000_000)}}, {})
except ResourceError as error:
    assert "disk is full" in str(error), error
    assert [p.name for p in root.iterdir()] == ["step-1"]
    assert checkpoint.latest_valid(root).step == 1
    print("as it should be")
"""


def test_a_really_full_disk(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if unshare is None or subprocess.run([unshare, "-rm", *mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs in a namespace of its own")
    script = '"$@" && exec "$PYTHON" -c "$CODE" "$FOLDER"'
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script, "sh", *mount],
        env=os.environ | {"PYTHON": sys.executable, "CODE": ON_A_SMALL_DISK, "FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "as it should be", done.stderr


def test_write_json_replaces_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "env.json"
    checkpoint.write_json(path, {"schema": 1, "name": "黄鹂"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"schema": 1, "name": "黄鹂"}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"disk is full while writing .*env\.json"):
        checkpoint.write_json(path, {})
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == "黄鹂"
    assert names(path.parent) == ["env.json"]


def test_all_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))

    draw()  # leaves half of a gaussian pair in Python's and NumPy's state
    plain, tensors = checkpoint.rng_state(CPU)
    plain = json.loads(json.dumps(plain))
    first = draw()
    assert draw() != first
    checkpoint.restore_rng(plain, tensors, CPU)
    assert draw() == first
