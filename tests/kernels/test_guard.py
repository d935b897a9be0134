"""What a launch asks of torch, and the errors where the answer is no."""

from __future__ import annotations

import pytest
import torch

from onegpu.errors import KernelError
from onegpu.kernels.guard import not_on_cuda, other_device, refuse_capture


def test_c_nothing_compiles_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    refuse_capture("linear_4bit")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelError, match=r"linear_4bit would compile .* while a CUDA graph is captured"):
        refuse_capture("linear_4bit")


def test_a_tensor_elsewhere_is_named() -> None:
    x = torch.zeros(2, 3)
    assert "a tensor of (2, 3) is on cpu, the first one on cuda:1" in str(other_device("few_rows", x, 1))
    assert str(other_device("few_rows", x, -1)).endswith("the first one on the CPU")
    assert "few_rows: its first tensor" in str(not_on_cuda("few_rows"))
