"""`oriole doctor` and `oriole plan` from outside."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from oriole.cli.plan import plan
from oriole.errors import ConfigError
from oriole.train import doctor

ENV = os.environ | {"COLUMNS": "200", "TERM": "dumb", "OMP_NUM_THREADS": "1"}


def oriole(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oriole.cli", *words], cwd=cwd, env=ENV, capture_output=True, text=True,
        encoding="utf-8", timeout=280,
    )  # fmt: skip


def test_doctor_says_what_is_here_and_what_will_be_used(tmp_path: Path) -> None:
    done = oriole("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    items = {item["name"]: item for item in made["items"]}
    assert made["schema"] == 1
    wanted = {"Oriole", "PyTorch", "processor", "memory", "disk", "device", "arithmetic", "torch.compile", "extras"}
    assert wanted <= items.keys()
    assert all(i["verdict"] in ("ok", "note", "problem") and i["found"] for i in made["items"])
    assert all(i["advice"] for i in made["items"] if i["verdict"] == "problem")
    assert "TFLOP/s" in items["device"]["found"] and str(tmp_path) in items["disk"]["found"]
    assert list(tmp_path.iterdir()) == []


def test_doctor_knows_every_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - {"dev"}
    for extra, (module, _) in doctor.EXTRAS.items():
        assert any(module in word for word in project["optional-dependencies"][extra])


def test_other_programs_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for load, verdict in ((0.1, "ok"), (1000.0, "note")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load))
        assert next(i for i in doctor.examine(tmp_path) if i.name == "load").verdict == verdict


def test_doctor_piped_is_plain_lines(tmp_path: Path) -> None:
    done = oriole("doctor", cwd=tmp_path)
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    assert done.stdout.splitlines()[-1].startswith(("ready to train", "1 problem", "2 problems"))


def test_what_is_scarce_is_a_problem_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def item(name: str) -> doctor.Item:
        return next(i for i in doctor.examine(tmp_path / "runs") if i.name == name)

    assert item("disk").verdict == item("memory").verdict == "ok"
    monkeypatch.setattr(doctor, "LOW_DISK", 1 << 60)
    monkeypatch.setattr(doctor, "LOW_MEMORY", 1 << 60)
    assert item("disk").verdict == item("memory").verdict == "problem"
    assert "run=FOLDER" in item("disk").advice


def test_a_container_s_limits_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from oriole.train import machine

    (tmp_path / "memory.max").write_text("2147483648\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.host_memory().limit == machine.host_memory().usable == 2 << 30
    assert machine.usable_cores()[1] == 1.5
    assert "this container may use 2.1 GB" in next(i for i in doctor.examine(tmp_path) if i.name == "memory").found
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.host_memory().limit is None and machine.usable_cores()[1] is None


def test_plan_for_a_machine_that_is_not_here(tmp_path: Path) -> None:
    done = oriole("plan", "1b", "device=8xH100", "price=20", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    (stage,) = made["stages"]
    assert stage["basis"] == "modelled" and stage["gpus"] == 8 and stage["fits"] is made["fits"] is True
    assert stage["peak_bytes"] == sum(stage["memory"].values())
    assert made["cost"] == pytest.approx(20 * made["seconds"] / 3600, rel=0.01)
    told = oriole("plan", "1b", "device=8xH100", "price=20", cwd=tmp_path).stdout
    for word in ("1.05B parameters", "21B", "MFU", "fits: ", "of 80.0 GB", "at 20 an hour"):
        assert word in told
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_folder_plans_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    plan("26m", ["device=3090", "sft.train.tokens=2e6"], as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in made["stages"]] == ["26m/pretrain", "26m/sft"]
    assert made["stages"][1]["tokens"] == {"count": 2e6, "source": "train.tokens", "known": True}
    assert made["seconds"] == pytest.approx(sum(s["total_seconds"] for s in made["stages"]), abs=0.2)
    plan("26m", ["device=3090", "sft.train.tokens=2e6"])
    told = capsys.readouterr().out
    assert "26m/sft on RTX 3090" in told and "all stages: " in told


def test_plan_measures_on_this_machine(tmp_path: Path) -> None:
    shape = "{vocab_size=300, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_dim=48, context=64}"
    settings = [f"model={shape}", "tokenizer.vocab_size=300", "train.tokens=9999", "train.length=32", "probe=0.2"]
    done = oriole("plan", "demo/pretrain", *settings, "train.compile=false", "price=1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads(done.stdout)["stages"]
    assert stage["basis"] == "measured" and stage["device"] == "cpu"
    assert stage["seconds"]["training"] > 0 and 0 < stage["cost"] < 1
    assert 50e6 < stage["peak_bytes"] < stage["memory_limit"]
    assert "measuring demo/pretrain" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1b", "device=h1000"], "did you mean H100"),
        (["nonsense"], "no recipes in 'nonsense'"),
        (["demo/pretrain", "device=H100", "train.lrr=1"], "did you mean 'lr'"),
        (["demo/sft", "init=nowhere", "device=H100"], "init=nowhere is no model folder"),
        (["demo/grpo", "device=H100"], "nothing is left to plan of demo/grpo"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(words[0], words[1:])
