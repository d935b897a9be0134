from __future__ import annotations

from pathlib import Path

import pytest

from onegpu import hardware
from onegpu.errors import ArgumentError


def device(**changes: object) -> hardware.Device:
    values = dict(
        name="X", capability=(9, 0), memory_bytes=1 << 30, bytes_per_s=1e12, flops_per_s=1e14, sms=100,
        shared_memory=232448, int8_ops_per_s=2e14,
    )  # fmt: skip
    return hardware.Device(**{**values, **changes})  # type: ignore[arg-type]


def test_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    assert hardware.roofline(1e12, 1, device()) == 1.0
    assert hardware.roofline(1, 1e14, device()) == 1.0
    assert hardware.roofline(1, 1e14, device(), int8=True) == 0.5


@pytest.mark.parametrize("missing", ["bytes_per_s", "flops_per_s"])
def test_roofline_of_an_unknown_gpu_is_none(missing: str) -> None:
    assert hardware.roofline(1e12, 1e12, device(**{missing: None})) is None


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("Tesla T4", 320),
    ],
)
def test_known_gpus_by_the_name_the_driver_reports(name: str, gigabytes: float) -> None:
    peak = hardware.peak_of(name)
    assert peak is not None and peak.gigabytes_per_s == gigabytes


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100", ""])
def test_a_name_that_is_only_similar_is_unknown(name: str) -> None:
    assert hardware.peak_of(name) is None


def test_table_holds_dense_rates() -> None:
    for name, peak in hardware.PEAKS.items():
        assert peak.source, name
        # int8 is 2 × the 16-bit rate, 4 × on GeForce cards, whose fp32 accumulation is halved.
        assert 1.9 < peak.int8_teraops / peak.teraflops < 4.1, name


def test_device_index_that_does_not_exist() -> None:
    with pytest.raises(ArgumentError, match=r"device=7 .*only GPUs 0 to 1"):
        hardware.check_device_index(7, count=2)
    with pytest.raises(ArgumentError, match=r"max_memory='cuda:1' .*only GPU 0"):
        hardware.check_device("cuda:1", name="max_memory", count=1)
    with pytest.raises(ArgumentError, match=r"torch sees none"):
        hardware.check_device("cuda", count=0)
    with pytest.raises(ArgumentError, match="is not a device"):
        hardware.check_device("cuda:first", count=1)
    for fine in ("auto", "balanced_low_0", "cpu", "disk", "meta", 0, "cuda", "cuda:0", "0"):
        hardware.check_device(fine, count=1)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_free_memory_heeds_a_container_limit_of_version_2(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", "MemTotal:  1000 kB\nMemAvailable:   800 kB\n")
    write(proc / "self" / "cgroup", "0::/pod/box\n")
    assert hardware.free_host_bytes(proc, cgroup) == 800 * 1024
    write(cgroup / "pod" / "memory.max", "500000\n")  # the limit stands on the parent
    write(cgroup / "pod" / "memory.current", "400000\n")
    write(cgroup / "pod" / "memory.stat", "anon 1\ninactive_file 50000\n")
    write(cgroup / "pod" / "box" / "memory.max", "max\n")
    write(cgroup / "pod" / "box" / "memory.current", "400000\n")
    assert hardware.free_host_bytes(proc, cgroup) == 150_000
    assert hardware.total_host_bytes(proc, cgroup) == 500_000


def test_free_memory_heeds_a_container_limit_of_version_1(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", "MemTotal:  1000 kB\nMemAvailable:   800 kB\n")
    write(proc / "self" / "cgroup", "3:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n")
    write(cgroup / "memory" / "memory.limit_in_bytes", "300000\n")
    write(cgroup / "memory" / "memory.usage_in_bytes", "100000\n")
    assert hardware.free_host_bytes(proc, cgroup) == 200_000
    write(cgroup / "memory" / "memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert hardware.free_host_bytes(proc, cgroup) == 800 * 1024


def test_this_machine() -> None:
    free, total, peak = hardware.free_host_bytes(), hardware.total_host_bytes(), hardware.peak_process_bytes()
    assert free is not None and total is not None and 0 < free <= total
    assert peak is not None and 1 << 20 < peak < 1 << 45
    assert hardware.cpu_count() >= 1 and hardware.cpu_name()


def test_detect_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "device_count", lambda: 0)
    assert hardware.detect() is None
    with pytest.raises(ArgumentError, match="index=0"):
        hardware.detect(0)


@pytest.mark.gpu
def test_detect_on_a_gpu() -> None:
    import torch

    found = hardware.detect(0)
    assert found is not None and found.name == torch.cuda.get_device_name(0)
    assert found.capability == torch.cuda.get_device_capability(0)
    assert found.sms > 0 and found.shared_memory >= 48 * 1024 and found.memory_bytes > 1 << 30
