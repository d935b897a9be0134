"""The value tables are in every checkpoint: bit for bit those of bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels.codebooks import BLOCK_SIZES, QUANT_TYPES, codebook_4bit, dynamic_map, pair_table_4bit
from tests.oracle import Oracle

CPU = torch.device("cpu")


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.cpu().view(torch.int32), theirs.cpu().view(torch.int32))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_4bit_tables_are_bitsandbytes(bitsandbytes: Oracle, device: str, quant_type: str) -> None:
    theirs = bitsandbytes.run(
        "result = bnb.functional.get_4bit_type(name, device=device).cpu()", name=quant_type, device=device
    )
    ours = codebook_4bit(quant_type, torch.device(device))
    assert ours.device.type == device and ours.shape == (16,)
    assert_same_bits(ours, theirs)


def test_dynamic_map_is_bitsandbytes(bitsandbytes: Oracle, device: str) -> None:
    theirs = bitsandbytes.run("result = bnb.functional.create_dynamic_map()")
    ours = dynamic_map(torch.device(device))
    assert ours.device.type == device and ours.shape == (256,)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_pair_table_holds_both_values_of_a_byte(device: str, quant_type: str) -> None:
    code = codebook_4bit(quant_type, torch.device(device))
    pairs = pair_table_4bit(quant_type, torch.device(device)).view(torch.float32).view(256, 2)
    for byte in range(256):
        assert pairs[byte].tolist() == [code[byte // 16].item(), code[byte % 16].item()]


def test_tables_span_minus_one_to_one_and_hold_zero() -> None:
    for table in (codebook_4bit("nf4", CPU), codebook_4bit("fp4", CPU), dynamic_map(CPU)):
        assert table.max() == 1.0 and table.min() >= -1.0 and (table == 0).any()
    assert dynamic_map(CPU).diff().gt(0).all() and codebook_4bit("nf4", CPU).diff().gt(0).all()
    fp4 = codebook_4bit("fp4", CPU)
    assert torch.equal(fp4[8:], -fp4[:8]) and not fp4.signbit()[8], "code 8 is plus zero in files"


def test_a_table_is_made_once_for_a_device() -> None:
    assert codebook_4bit("nf4", CPU) is codebook_4bit("nf4", CPU) and dynamic_map(CPU) is dynamic_map(CPU)


def test_an_unknown_type_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'int4' .*nf4, fp4"):
        codebook_4bit("int4", CPU)


def test_block_sizes_are_those_of_bitsandbytes(bitsandbytes: Oracle) -> None:
    accepted = bitsandbytes.run(
        """
        result = []
        for size in sizes:
            try:
                bnb.functional.quantize_4bit(torch.ones(64, 64), blocksize=size)
            except (RuntimeError, ValueError):
                continue
            result.append(size)
        """,
        sizes=[16, *BLOCK_SIZES, 48, 8192],
    )
    assert accepted == list(BLOCK_SIZES)
