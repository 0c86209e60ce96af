"""Peaks and MFU: the table knows the names that drivers give, and what is not in it is measured."""

import math
import time
from pathlib import Path

import pytest
import torch
from toy_training import SHAPE, Counting, trainer

from oriole.errors import ConfigError
from oriole.model.costs import flops_per_token
from oriole.train.accelerators import ACCELERATORS, find_accelerator, parse_cluster
from oriole.train.batch import Batch, Packer
from oriole.train.machine import Mfu, Peak, peak_flops


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Quadro RTX 6000", None),
    ],
)
def test_drivers_names(driver: str, name: str | None) -> None:
    found = find_accelerator(driver)
    assert (found.name if found else None) == name


def test_every_entry_is_found_by_its_own_name_and_has_possible_figures() -> None:
    for entry in ACCELERATORS:
        assert find_accelerator(entry.name) is entry
        assert find_accelerator(entry.name.lower()) is entry
        assert 1 < entry.tflops / entry.fp32 < 30 and entry.memory >= 8
        # FLOPs for each byte of memory traffic: between a gaming card and a server card.
        assert 30 < entry.tflops * 1e3 / entry.bandwidth < 500


def test_clusters() -> None:
    assert parse_cluster("8xH100")[1:] == (8, 1)
    assert parse_cluster("4x8xH200")[1:] == (8, 4) and parse_cluster("4x8xh200").gpus == 32
    assert [str(parse_cluster(t)) for t in ("4090", "8xh100", "4x8xH200")] == ["RTX 4090", "8xH100", "4x8xH200"]
    assert parse_cluster("a100").gpus == 1
    with pytest.raises(ConfigError, match="did you mean RTX 4090"):
        parse_cluster("409O")
    with pytest.raises(ConfigError, match="known are B200"):
        parse_cluster("toaster")
    with pytest.raises(ConfigError, match="above zero"):
        parse_cluster("0xH100")


def test_the_peak_of_a_cpu_is_measured_once_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak.flops < 1e15 and "product here" in peak.source
    assert peak_flops(torch.device("cpu"), torch.float32) is peak
    assert torch.equal(before, torch.get_rng_state())


def test_mfu_is_the_share_of_all_devices_peak() -> None:
    # nanochat's depth-12 model on one H100: 0.760 GFLOP a token, 546K tokens/s, 41.9 % (reported by a third party).
    mfu = Mfu(0.760e9, Peak(989e12, "data sheet"))
    assert mfu.of(546e3) == pytest.approx(0.419, abs=0.002)
    assert mfu._replace(devices=2).of(546e3) == pytest.approx(0.21, abs=0.001)
    assert "989 TFLOP/s" in str(mfu) and "2 devices" in str(mfu._replace(devices=2))


def test_records_of_a_run_carry_mfu_and_its_formula(tmp_path: Path) -> None:
    flops = flops_per_token(SHAPE, 32)
    made = trainer(tmp_path, steps=8, more={"flops_per_token": flops})
    made.fit()
    (start,) = made.metrics.of("start")
    assert start["flops_per_token"] == flops and "6 N" in start["mfu_is"]
    for record in made.metrics.of("step"):
        expected = record["tokens_per_second"] * flops / start["peak_flops"]
        assert record["mfu"] == pytest.approx(expected, abs=1e-4) and math.isfinite(record["mfu"])


class _Slow(Packer):
    """Batches that take longer to come than a step of the tiny model takes."""

    def __next__(self) -> Batch:
        time.sleep(0.05)
        return super().__next__()


def test_a_run_says_once_that_it_waits_for_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path / "slow", steps=12, log_every=2, more={"data": _Slow(Counting(), 4, 32)}).fit()
    assert capsys.readouterr().err.count("the device waits for data") == 1


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = []
    for a in ACCELERATORS:
        name = a.name if a.bf16 else f"{a.name} (fp16)"
        rows.append(f"| {name} | {a.tflops:g} | {a.fp32:g} | {a.memory:g} | {a.bandwidth:,g} | {a.link:g} |")
    assert text.rstrip().endswith("\n".join(rows)), "\n" + "\n".join(rows)
