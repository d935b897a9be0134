"""What a launch asks of torch: the current device and stream, and whether a CUDA graph is being captured."""

from __future__ import annotations

from functools import lru_cache

import torch

from onegpu.errors import KernelError


def current_device() -> int:
    """Index of this thread's current CUDA device."""
    return torch._C._cuda_getDevice()


def raw_stream(device: int) -> int:
    """The handle of torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device)


@lru_cache(maxsize=64)
def architecture(device: int) -> str:
    """Of a device, as the compiler calls it; with the features of exactly that one from Hopper on: ``"sm_90a"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def refuse_capture(op: str) -> None:
    """Raises where a CUDA graph is being captured: compiling and loading synchronise, which breaks the capture."""
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"{op} would compile or load a kernel while a CUDA graph is captured."
            " Call onegpu.warmup(model), or run the same step once, before the capture"
        )


def other_device(op: str, tensor: torch.Tensor, device: int) -> KernelError:
    """Returns the error for a tensor that is not where the first one is."""
    first = f"cuda:{device}" if device >= 0 else "the CPU"
    return KernelError(f"{op}: a tensor of {tuple(tensor.shape)} is on {tensor.device}, the first one on {first}")


def not_on_cuda(op: str) -> KernelError:
    """Returns the error for a first tensor that is on the CPU."""
    return KernelError(f"{op}: its first tensor is not on a CUDA device")
