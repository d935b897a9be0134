"""What "equal" means for floats: the one comparison of the whole repository (DESIGN.md section 4).

A result may be at most twice as far from the float32 reference as PyTorch itself is, in the dtype of the result, with
its operations in another order; plus what rounding alone does at the size of the reference.
"""

from __future__ import annotations

import torch


def assert_close(
    actual: torch.Tensor, reference: torch.Tensor, reordered: torch.Tensor, *, gradient: bool = False, what: str = ""
) -> None:
    """``max|actual - reference| <= 2 * max|reordered - reference| + noise``; NaN and infinities in the same places.

    Args:
        actual: what is tested, in its own dtype.
        reference: the same in float32 (or float64), from inputs cast up.
        reordered: the same by plain PyTorch in the dtype of ``actual``, its operations in another order.
        gradient: also ask for ``rms(actual - reference) < 0.005 * rms(reference)``.
        what: begins the message of a failure.
    """
    prefix = f"{what}: " if what else ""
    assert reference.dtype in (torch.float32, torch.float64), f"{prefix}the reference is {reference.dtype}, not float32"
    assert reordered.dtype == actual.dtype, f"{prefix}actual is {actual.dtype}, reordered {reordered.dtype}"
    assert actual.shape == reference.shape == reordered.shape, (
        f"{prefix}shapes {tuple(actual.shape)}, {tuple(reference.shape)}, {tuple(reordered.shape)}"
    )
    finite = reference.isfinite()
    assert_same_nonfinite(actual, reference, what=what)
    if not finite.any():
        return
    got, wanted, other = (tensor[finite].double() for tensor in (actual, reference, reordered))
    error, allowed = (got - wanted).abs().max(), (other - wanted).abs().max()
    rounded = reference[finite].to(actual.dtype)
    noise = (rounded + 0.3 - 0.3 - rounded).double().abs().max()
    limit = 2 * allowed + 2 * noise
    assert error <= limit, (
        f"{prefix}max error {error:.3e} > {limit:.3e} = 2 × {allowed:.3e} (reordered) + 2 × {noise:.3e} (rounding)"
    )
    if gradient:
        ratio = (got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert ratio < 0.005, f"{prefix}RMS error is {ratio:.4f} of the RMS, at most 0.005 is allowed"


def assert_same_nonfinite(actual: torch.Tensor, reference: torch.Tensor, *, what: str = "") -> None:
    """NaN where the reference has NaN, each infinity where it has that one, and finite elsewhere."""
    prefix = f"{what}: " if what else ""
    for name, of in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (of(actual) != of(reference.to(actual.dtype))).sum().item()
        assert wrong == 0, f"{prefix}{wrong} of {actual.numel()} elements differ in being {name}"
