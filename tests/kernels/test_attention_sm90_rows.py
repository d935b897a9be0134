"""What stands around the Hopper backward, in the interpreter: from dO to the rows, from the sum to dQ."""

from __future__ import annotations

from tests.triton_tools import interpret, needs_triton


@needs_triton
def test_rows_and_dq_of_dense_padded_and_packed_sequences() -> None:
    interpret(
        """
        import math
        from onegpu.kernels import attention_sm90_rows as kernels

        def int32(*x):
            return torch.tensor(x, dtype=torch.int32)

        S, H, HEAD, D, M = 150, 2, 40, 64, 128
        cases = (0, None, [(0, 150), (0, 150)]), (1, int32((20, 130), (7, 60)), [(20, 130), (7, 60)])
        for how, rows, lengths in (*cases, (2, int32(0, 130, 145), [(0, 130), (130, 15)])):
            shape = (1, S, H, HEAD) if how == 2 else (2, S, H, HEAD)
            out, grad = torch.randn(shape), torch.randn(shape)
            lse, grad_lse = torch.randn(shape[0], H, S), torch.randn(shape[0], H, S)
            lse[0, 0, 25] = -math.inf
            n_b = S // M + 2 if how == 2 else 2
            blocks = n_b * H * shape[0]
            row_values, total = torch.full((blocks, 2, M), math.nan), torch.full((blocks * M * D,), math.nan)
            grid = (2 * H * 2,)
            pointer = rows if how else lse
            strides = (0 if how == 2 else grad.stride(0), grad.stride(1), grad.stride(2))
            kernels.before_kernel[grid](out, grad, lse, grad_lse, row_values, total, pointer, *strides, H, S, n_b, 2,
                                        HEAD=HEAD, D=D, M=M, RQ=how)
            dq = torch.full(shape, 9.0)
            expected = torch.full(shape, 9.0) if how == 2 else torch.zeros(shape)
            sums = torch.randn(blocks * M, D)
            for b, (first, n) in enumerate(lengths):
                at, row = slice(first, first + n), 0 if how == 2 else b
                for h in range(H):
                    start = h * n_b + first // M + b if how == 2 else (b * H + h) * n_b
                    got = row_values[start : start + -(-n // M)].transpose(0, 1).reshape(2, -1)
                    wanted = lse[row, h, at] / math.log(2)
                    wanted = wanted.masked_fill(wanted == -math.inf, math.inf)
                    torch.testing.assert_close(got[0, :n], wanted)
                    assert (got[0, n:] == math.inf).all() and not got[1, n:].any()
                    delta = (out[row, at, h] * grad[row, at, h]).sum(-1) - grad_lse[row, h, at]
                    torch.testing.assert_close(got[1, :n], delta, rtol=1e-4, atol=1e-4)
                    assert not total.view(-1, M * D)[start : start + -(-n // M)].any()
                    expected[row, at, h] = 0.5 * sums[start * M : start * M + n, :HEAD]
            kernels.after_kernel[(3 * H * 2,)](sums, dq, pointer, H, S, n_b, 3, 0.5, HEAD=HEAD, D=D, M=M, RQ=how)
            torch.testing.assert_close(dq, expected)
        """
    )
