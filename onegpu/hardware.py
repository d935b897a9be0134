"""What this machine can do: its GPUs' limits, the memory that is free, the memory this process took.

The lowest layer: everything that asks "how fast could this be" or "does this fit" asks here, and this module asks only
torch and the operating system. Nothing is measured and nothing is guessed: a GPU that the table below does not know has
no peak figures (`None`), and `roofline` then has no answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from onegpu.errors import bad_argument


@dataclass(frozen=True)
class Device:
    """One GPU. The peak figures are the vendor's (see `source`), and None for a GPU that is not in the table.

    Attributes:
        name: as the driver reports it.
        capability: CUDA compute capability, such as (9, 0).
        memory_bytes: size of its memory.
        bytes_per_s: peak memory bandwidth.
        flops_per_s: peak dense 16-bit tensor-core rate with fp32 accumulation (fp16 before Ampere, which has no bf16).
        int8_ops_per_s: peak dense int8 tensor-core rate.
        sms: streaming multiprocessors.
        shared_memory: bytes of shared memory that one block can ask for.
        source: the document the peak figures come from.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    bytes_per_s: float | None
    flops_per_s: float | None
    sms: int
    shared_memory: int
    int8_ops_per_s: float | None = None
    source: str | None = None


class Peak(NamedTuple):
    """Peak figures of one GPU product: memory bandwidth, dense 16-bit and int8 tensor-core rates, where they stand."""

    gigabytes_per_s: float
    teraflops: float
    int8_teraops: float
    source: str


# Keyed by the name the driver reports, without the vendor. Data sheets print tensor-core rates with sparsity; these are
# the dense ones. Products whose sheet gives no clear dense rate with fp32 accumulation are left out on purpose.
PEAKS: dict[str, Peak] = {
    "T4": Peak(320, 65, 130, "NVIDIA T4 data sheet"),
    "A100-SXM4-80GB": Peak(2039, 312, 624, "NVIDIA A100 data sheet"),
    "A100 80GB PCIe": Peak(1935, 312, 624, "NVIDIA A100 data sheet"),
    "A100-SXM4-40GB": Peak(1555, 312, 624, "NVIDIA A100 data sheet"),
    "A100-PCIE-40GB": Peak(1555, 312, 624, "NVIDIA A100 data sheet"),
    "A10": Peak(600, 125, 250, "NVIDIA A10 data sheet"),
    "A30": Peak(933, 165, 330, "NVIDIA A30 data sheet"),
    "A40": Peak(696, 149.7, 299.3, "NVIDIA A40 data sheet"),
    "RTX A6000": Peak(768, 154.8, 309.7, "NVIDIA Ampere GA102 whitepaper"),
    "GeForce RTX 3080": Peak(760, 59.5, 238, "NVIDIA Ampere GA102 whitepaper"),
    "GeForce RTX 3090": Peak(936, 71, 284, "NVIDIA Ampere GA102 whitepaper"),
    "L4": Peak(300, 121, 242.5, "NVIDIA L4 data sheet"),
    "L40": Peak(864, 181.05, 362, "NVIDIA L40 data sheet"),
    "L40S": Peak(864, 362.05, 733, "NVIDIA L40S data sheet"),
    "GeForce RTX 4080": Peak(716.8, 97.5, 389.9, "NVIDIA Ada GPU architecture whitepaper"),
    "GeForce RTX 4090": Peak(1008, 165.2, 660.6, "NVIDIA Ada GPU architecture whitepaper"),
    "H100 80GB HBM3": Peak(3350, 989.4, 1978.9, "NVIDIA H100 data sheet (SXM)"),
    "H100 PCIe": Peak(2000, 756, 1513, "NVIDIA H100 data sheet (PCIe)"),
    "H100 NVL": Peak(3900, 835.5, 1671, "NVIDIA H100 data sheet (NVL)"),
    "H200": Peak(4800, 989.4, 1978.9, "NVIDIA H200 data sheet (SXM)"),
    "H200 NVL": Peak(4800, 835.5, 1671, "NVIDIA H200 data sheet (NVL)"),
    "GeForce RTX 5090": Peak(1792, 209.5, 838, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    "B200": Peak(8000, 2250, 4500, "NVIDIA HGX B200 data sheet"),
}


def peak_of(name: str) -> Peak | None:
    """The vendor's peak figures for a GPU by the name the driver reports; None if this table does not know it.

    Only the whole name counts: "H100" alone would not say which of three memory systems it has.
    """
    short = name.strip()
    for vendor in ("NVIDIA ", "Tesla "):
        short = short.removeprefix(vendor)
    return PEAKS.get(short)


def device_count() -> int:
    """Number of CUDA devices torch can use; 0 without a GPU or with a CPU build of torch."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def detect(index: int | None = None) -> Device | None:
    """The GPU with this index (default: the current one), or None on a machine without a GPU.

    Raises:
        ArgumentError: there is no GPU with this index.
    """
    import torch

    count = device_count()
    if index is None:
        if count == 0:
            return None
        index = torch.cuda.current_device()
    check_device_index(index, name="index", count=count)
    properties = torch.cuda.get_device_properties(index)
    peak = peak_of(properties.name)
    return Device(
        name=properties.name,
        capability=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
        bytes_per_s=peak.gigabytes_per_s * 1e9 if peak else None,
        flops_per_s=peak.teraflops * 1e12 if peak else None,
        sms=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        int8_ops_per_s=peak.int8_teraops * 1e12 if peak else None,
        source=peak.source if peak else None,
    )


def check_device_index(index: int, *, name: str = "device", value: object = None, count: int | None = None) -> None:
    """Raises ArgumentError unless GPU `index` exists.

    Args:
        name, value: the argument to blame and what the user passed (default: `index`).
        count: number of GPUs; asked of torch if it is not given.
    """
    count = device_count() if count is None else count
    if 0 <= index < count:
        return
    if count == 0:
        why, fix = "needs a GPU, and torch sees none on this machine", "Use the CPU, or see `onegpu env`"
    else:
        have = "only GPU 0" if count == 1 else f"only GPUs 0 to {count - 1}"
        why, fix = f"names a GPU that does not exist: this machine has {have}", f"Use an index below {count}"
    raise bad_argument(name, index if value is None else value, why, fix)


def check_device(device: object, *, name: str = "device", count: int | None = None) -> None:
    """Raises ArgumentError if `device` ("cuda:3", 3, a torch.device, "auto", …) names a GPU that does not exist.

    Words that are not devices ("auto", "balanced") and other kinds of device ("cpu", "disk", "meta") pass.
    """
    if isinstance(device, int) and not isinstance(device, bool):
        check_device_index(device, name=name, count=count)
        return
    kind, _, index = str(device).partition(":")
    if kind == "cuda" or kind.isdecimal():
        number = kind if kind.isdecimal() else (index or "0")
        if not number.isdecimal():
            raise bad_argument(name, device, "is not a device", 'Write "cuda:0", 0 or "cpu"')
        check_device_index(int(number), name=name, value=device, count=count)


def roofline(bytes: float, flops: float, device: Device, *, int8: bool = False) -> float | None:
    """The least time, in seconds, in which `device` can move `bytes` and do `flops`; None if its peaks are unknown.

    Args:
        bytes: bytes read and written in device memory.
        flops: floating point operations (a multiply-add is two); with `int8=True` integer operations.
        device: from `detect()`.
        int8: use the int8 rate instead of the 16-bit one.
    """
    rate = device.int8_ops_per_s if int8 else device.flops_per_s
    if device.bytes_per_s is None or rate is None:
        return None
    return max(bytes / device.bytes_per_s, flops / rate)


def peak_process_bytes(proc: Path = Path("/proc")) -> int | None:
    """The most resident memory this process has held so far; None where the system does not say."""
    # getrusage keeps the parent's figure over exec on Linux, which a test runner or a shell with a large heap shows.
    high_water = _fields(proc / "self" / "status").get("VmHWM")
    if high_water is not None:
        return high_water
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def total_host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory of this machine, or of the container this process may not exceed; None where the system does not say."""
    total = _fields(proc / "meminfo").get("MemTotal")
    if total is None:
        total = _sysconf_bytes("SC_PHYS_PAGES")
    limits = [limit for limit, _ in _cgroup_memory(proc, cgroup)]
    return min([*limits, *([total] if total is not None else [])], default=None)


def free_host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can still be taken without swapping, a container's limit included; None where nothing says."""
    free = _fields(proc / "meminfo").get("MemAvailable")
    if free is None:
        free = _sysconf_bytes("SC_AVPHYS_PAGES")
    rooms = [max(0, limit - used) for limit, used in _cgroup_memory(proc, cgroup)]
    return min([*rooms, *([free] if free is not None else [])], default=None)


def cpu_name(proc: Path = Path("/proc")) -> str:
    """The processor's name."""
    import platform

    for line in _text(proc / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Processors this process may run on, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _text(path: Path) -> str:
    """The file's text, "" if it is not there or may not be read: none of these files exists on every system."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _fields(path: Path) -> dict[str, int]:
    """Bytes by name from a file of lines such as `MemAvailable:   123 kB`."""
    values = {}
    for line in _text(path).splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if number.isdecimal() and unit == "kB":
            values[name] = int(number) * 1024
    return values


def _sysconf_bytes(pages: str) -> int | None:
    names = getattr(os, "sysconf_names", {})
    if pages not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_memory(proc: Path, cgroup: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of every control group above this process that has a limit."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2: one hierarchy for everything
            root, limit_file, used_file, reclaimable = cgroup, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_file = cgroup / "memory", "memory.limit_in_bytes"
            used_file, reclaimable = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container the group's path may be the host's, which is not mounted here: then only the root is found.
        place = root / group.lstrip("/")
        for folder in (place, *place.parents):
            limit, used = _text(folder / limit_file).strip(), _text(folder / used_file).strip()
            if limit.isdecimal() and used.isdecimal() and int(limit) < 1 << 60:  # version 1 writes "no limit" as 2⁶³
                yield int(limit), max(0, int(used) - _stat(folder / "memory.stat", reclaimable))
            if folder == root:
                break


def _stat(path: Path, name: str) -> int:
    """One number from a file of `name number` lines; 0 if it is not there."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
