"""Peaks of GPUs from their makers' data sheets, for MFU and for planning on a machine that is not at hand. No torch."""

import difflib
import re
from typing import NamedTuple

from oriole.errors import ConfigError

__all__ = ["ACCELERATORS", "Accelerator", "Cluster", "find_accelerator", "parse_cluster"]


class Accelerator(NamedTuple):
    """One GPU. Peaks are dense, without the makers' factor of two for sparsity."""

    name: str
    tflops: float
    """bf16 tensor peak with fp32 accumulation, TFLOP/s; of fp16 where there is no bf16."""
    fp32: float
    """Plain fp32 peak, TFLOP/s."""
    memory: float
    """GB."""
    bandwidth: float
    """Of the memory, GB/s."""
    link: float
    """To a GPU of the same machine, GB/s in one direction: half of the NVLink or Infinity Fabric figure, or PCIe."""
    bf16: bool = True
    """Whether it has bf16 tensor units."""


_PCIE3, _PCIE4, _PCIE5 = 16.0, 32.0, 64.0

# Sources: NVIDIA's data sheets "NVIDIA H100 Tensor Core GPU", "H200", "HGX B200", "A100", "A800", "A30", "A10", "A40",
# "L4", "L40", "L40S", "V100", "T4", "RTX A6000", "RTX 6000 Ada", "RTX PRO 6000"; the architecture white papers "NVIDIA
# Turing GPU", "Ampere GA102", "Ada GPU" and "RTX Blackwell GPU" (tables of tensor TFLOPS "with FP32 accumulate", which
# is half of the rate with FP16 accumulate on GeForce cards); AWS for the A10G; AMD's data sheets of MI250X (one of its
# two dies, as PyTorch sees it) and MI300X.
ACCELERATORS: tuple[Accelerator, ...] = (
    Accelerator("B200", 2250, 80, 180, 7700, 900),
    Accelerator("GH200", 989, 67, 96, 4000, 450),
    Accelerator("H200", 989, 67, 141, 4800, 450),
    Accelerator("H100", 989, 67, 80, 3350, 450),
    Accelerator("H100 NVL", 835, 60, 94, 3900, 300),
    Accelerator("H100 PCIe", 756, 51, 80, 2000, _PCIE5),
    Accelerator("H800", 989, 67, 80, 3350, 200),
    Accelerator("H20", 148, 44, 96, 4000, 450),
    Accelerator("A100", 312, 19.5, 80, 2039, 300),
    Accelerator("A100 40GB", 312, 19.5, 40, 1555, 300),
    Accelerator("A800", 312, 19.5, 80, 2039, 200),
    Accelerator("A30", 165, 10.3, 24, 933, _PCIE4),
    Accelerator("A40", 149.7, 37.4, 48, 696, _PCIE4),
    Accelerator("A10", 125, 31.2, 24, 600, _PCIE4),
    Accelerator("A10G", 70, 31.5, 24, 600, _PCIE4),
    Accelerator("L40S", 362, 91.6, 48, 864, _PCIE4),
    Accelerator("L40", 181, 90.5, 48, 864, _PCIE4),
    Accelerator("L4", 121, 30.3, 24, 300, _PCIE4),
    Accelerator("RTX PRO 6000", 503.8, 125, 96, 1792, _PCIE5),
    Accelerator("RTX 6000 Ada", 364.2, 91.1, 48, 960, _PCIE4),
    Accelerator("RTX A6000", 154.8, 38.7, 48, 768, _PCIE4),
    Accelerator("RTX A5000", 111.1, 27.8, 24, 768, _PCIE4),
    Accelerator("RTX 5090", 209.5, 104.8, 32, 1792, _PCIE5),
    Accelerator("RTX 5080", 112.6, 56.3, 16, 960, _PCIE5),
    Accelerator("RTX 5070 Ti", 87.9, 43.9, 16, 896, _PCIE5),
    Accelerator("RTX 5070", 61.7, 30.9, 12, 672, _PCIE5),
    Accelerator("RTX 4090", 165.2, 82.6, 24, 1008, _PCIE4),
    Accelerator("RTX 4080 Super", 104.4, 52.2, 16, 736, _PCIE4),
    Accelerator("RTX 4080", 97.5, 48.7, 16, 717, _PCIE4),
    Accelerator("RTX 4070 Ti Super", 88.2, 44.1, 16, 672, _PCIE4),
    Accelerator("RTX 4070 Ti", 80.2, 40.1, 12, 504, _PCIE4),
    Accelerator("RTX 4070 Super", 70.9, 35.5, 12, 504, _PCIE4),
    Accelerator("RTX 4070", 58.3, 29.1, 12, 504, _PCIE4),
    Accelerator("RTX 4060 Ti", 44.1, 22.1, 16, 288, _PCIE4),
    Accelerator("RTX 4060", 30.2, 15.1, 8, 272, _PCIE4),
    Accelerator("RTX 3090 Ti", 80, 40, 24, 1008, _PCIE4),
    Accelerator("RTX 3090", 71, 35.6, 24, 936, _PCIE4),
    Accelerator("RTX 3080 Ti", 68.2, 34.1, 12, 912, _PCIE4),
    Accelerator("RTX 3080", 59.5, 29.8, 10, 760, _PCIE4),
    Accelerator("RTX 3070", 40.6, 20.3, 8, 448, _PCIE4),
    Accelerator("RTX 3060", 25.5, 12.7, 12, 360, _PCIE4),
    Accelerator("MI300X", 1307, 163.4, 192, 5300, 448),
    Accelerator("MI250X", 191.5, 23.9, 64, 1638, 200),
    Accelerator("V100", 125, 15.7, 16, 900, 150, bf16=False),
    Accelerator("V100 32GB", 125, 15.7, 32, 900, 150, bf16=False),
    Accelerator("TITAN RTX", 130.5, 16.3, 24, 672, _PCIE3, bf16=False),
    Accelerator("RTX 2080 Ti", 53.8, 13.4, 11, 616, _PCIE3, bf16=False),
    Accelerator("T4", 65, 8.1, 16, 320, _PCIE3, bf16=False),
)

_COMMON = {"nvidia", "geforce", "rtx", "tesla", "amd", "instinct", "gb", "gpu", "sxm", "oam"}
"""Words that tell no two GPUs apart."""


def _words(name: str) -> set[str]:
    """`NVIDIA A100-SXM4-40GB` -> {a100, sxm4, 40}; `4070Ti` -> {4070, ti}; `L40S` -> {l40, s}."""
    return set(re.findall(r"[a-z]*\d+|[a-z]+", name.lower())) - _COMMON


def find_accelerator(name: str) -> Accelerator | None:
    """The GPU of that name, as a driver or a person writes it; None when the table has none.

    Of several that fit, the one whose name says most: `H100 PCIe` is not `H100`. Laptop versions carry a desktop card's
    name but not its speed; they are unknown here.
    """
    words = _words(name)
    if "laptop" in words or "mobile" in words:
        return None
    fitting = [a for a in ACCELERATORS if _words(a.name) <= words]
    return max(fitting, key=lambda a: len(_words(a.name)), default=None)


class Cluster(NamedTuple):
    """Machines alike, each with the same number of the same GPU."""

    gpu: Accelerator
    per_node: int
    nodes: int

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.per_node * self.nodes

    def __str__(self) -> str:
        counts = [n for n in (self.nodes, self.per_node) if n > 1] if self.nodes == 1 else [self.nodes, self.per_node]
        return "x".join([*map(str, counts), self.gpu.name])


def parse_cluster(text: str) -> Cluster:
    """`4090`, `8xH100`, `4x8xH200` (four machines of eight) -> a cluster; `ConfigError` names the nearest known GPU."""
    match = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(?:(\d+)\s*[x*]\s*)?(.+)", text.strip(), flags=re.I)
    first, second, name = match.groups() if match else (None, None, text)
    gpu = find_accelerator(name)
    if gpu is None:
        known = {re.sub(r"^RTX ", "", a.name).lower(): a.name for a in ACCELERATORS}
        near = difflib.get_close_matches(re.sub(r"^(nvidia|geforce|rtx|\s)+", "", name.lower()), known, n=1, cutoff=0.5)
        hint = f"did you mean {known[near[0]]}?" if near else f"known are {', '.join(known.values())}"
        raise ConfigError(f"device={text}: no figures for '{name}'; {hint} (docs/plan.md lists them all)")
    nodes, per_node = (int(first), int(second)) if first and second else (1, int(first or 1))
    if nodes < 1 or per_node < 1:
        raise ConfigError(f"device={text}: write a number of GPUs above zero, for example 8x{gpu.name}")
    return Cluster(gpu, per_node, nodes)
