"""Row-wise int8, the arithmetic of LLM.int8() (arXiv:2208.07339), step by step."""

from __future__ import annotations

import torch

from onegpu.kernels import quant_int8  # noqa: F401  (defines the op)
from onegpu.kernels.linear_int8 import integer_product


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantise each row of ``A`` (float16 ``[..., K]``) to int8 by its largest magnitude.

    Returns int8 codes of A's shape, float32 row maxima ``[rows]``, and int64 indices of the columns that hold a value
    at or above ``threshold`` (None where the threshold is 0), which are zero in the codes.
    """
    if threshold < 0.0:
        raise ValueError(f"threshold={threshold} must not be negative; 0 turns outliers off")
    codes, absmax, mask = torch.ops.onegpu.int8_vectorwise_quant(A, threshold)
    return codes, absmax, mask.nonzero().view(-1) if threshold > 0.0 else None


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Undo :func:`int8_vectorwise_quant`: int8 ``[rows, K]`` and float32 ``[rows]`` to float32 ``[rows, K]``."""
    return A * stats.view(-1, 1) * (1.0 / 127.0)


def int8_double_quant(
    A: torch.Tensor,
    col_stats: torch.Tensor | None = None,
    row_stats: torch.Tensor | None = None,
    out_col: torch.Tensor | None = None,
    out_row: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantise ``A`` (float16 ``[M, K]``) by its rows and, independently, by its columns.

    Returns codes by row and by column, both int8 ``[M, K]``; the float32 maxima ``[M]`` and ``[K]``; the columns with
    outliers as :func:`int8_vectorwise_quant` gives them. The four arguments before the last exist for bitsandbytes'
    signature and must be None, as there.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(wrong)}: int8_double_quant fills nothing that is passed in; leave it out")
    by_row, row_maxima, columns = int8_vectorwise_quant(A, threshold)
    if threshold > 0.0:
        A = A.masked_fill(A.abs() >= threshold, 0.0)
    by_column, column_maxima, _ = int8_vectorwise_quant(A.t().contiguous())
    return by_row, by_column.t().contiguous(), row_maxima, column_maxima, columns


def int8_linear_matmul(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """``A @ B.T`` in integers: int8 ``[..., K]`` and ``[N, K]`` to ``[..., N]`` of ``dtype``, exact in int32."""
    for name, tensor in (("A", A), ("B", B)):
        if tensor.dtype != torch.int8:
            raise ValueError(f"int8_linear_matmul takes int8, got {name}.dtype={tensor.dtype}; quantise {name} first")
    if B.dim() != 2 or A.shape[-1] != B.shape[1]:
        raise ValueError(
            f"B.shape={tuple(B.shape)} does not fit A.shape={tuple(A.shape)}; B is [N, {A.shape[-1]}], a row an output"
        )
    product = integer_product(A.reshape(-1, A.shape[-1]), B, exact=True).view(*A.shape[:-1], B.shape[0]).to(dtype)
    return product if out is None else out.copy_(product)


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale a product of two int8 matrices back.

    Args:
        A: the product, ``[..., N]``, int32 as :func:`int8_linear_matmul` gives it.
        row_stats, col_stats: row maxima of the two operands, of ``[rows]`` and ``[N]`` elements.
        out: filled with the result where given.
        bias: ``[N]`` or None.

    Returns:
        float16 of A's shape.
    """
    values = A.reshape(-1, A.shape[-1]) * (row_stats.reshape(-1, 1).float() * col_stats.reshape(1, -1).float())
    values *= 1.0 / (127.0 * 127.0)
    if bias is not None:
        values += bias
    result = values.view(A.shape).to(torch.float16)
    return result if out is None else out.copy_(result)
