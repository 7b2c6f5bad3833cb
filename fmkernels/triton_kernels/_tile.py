"""How a [rows, columns] problem is cut into programs, and how kernels find their part of it.

A program owns ``block_rows`` rows and walks ``steps`` tiles of ``4·block_groups`` columns along them: small rows share
a program, long rows are split over several. Offsets are int64.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE = 2048  # elements of a tile: 16 a thread
SMALL_TILE = 1024  # for float64, whose values take two registers, and for short rows, whose threads serve several
SHORT_ROW = 64
MAX_PROGRAMS = 4096  # beyond that, programs walk several tiles, so that per-row work and partial sums stay few
MAX_STEPS = 64


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton's own takes microseconds, and so does its next_power_of_2


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """Launch configuration of a kernel over [rows, columns]."""

    block_rows: int
    block_groups: int
    steps: int
    num_warps: int
    align: int  # power of two up to 16 that divides the row length: rows start so aligned
    column_programs: int
    programs: int

    @classmethod
    def of(cls, rows: int, columns: int, dtype: torch.dtype, widened: int = 1) -> Tile:
        elements = SMALL_TILE if dtype == torch.float64 or columns <= SHORT_ROW else widened * TILE
        block_groups = min(next_power_of_2(cdiv(columns, 4)), elements // 4)
        block_rows = elements // (4 * block_groups)
        tiles = cdiv(columns, 4 * block_groups)
        row_programs, steps = cdiv(rows, block_rows), 1
        while steps < min(tiles, MAX_STEPS) and row_programs * cdiv(tiles, steps) > MAX_PROGRAMS:
            steps *= 2
        column_programs = max(cdiv(tiles, steps), 1)
        align = min(columns & -columns, 16) or 16
        return cls(block_rows, block_groups, steps, 4, align, column_programs, row_programs * column_programs)

    @property
    def constants(self) -> dict:
        """What a kernel is compiled for."""
        return {
            "ALIGN": self.align,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_GROUPS": self.block_groups,
            "STEPS": self.steps,
            "num_warps": self.num_warps,
        }


def launch(kernel, programs: int, *arguments, device: torch.device, fp_fusion: bool = True, **constants) -> None:
    """Run ``programs`` programs of a kernel on ``device``. Triton launches on the current device, and its default for
    the fusion of multiplications and additions changes between versions: both are pinned here."""
    if programs == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, enable_fp_fusion=fp_fusion, **constants)


@triton.jit
def program_rows(column_programs, BLOCK_ROWS: tl.constexpr):
    """Indices of a program's rows, int64 [BLOCK_ROWS]."""
    return (tl.program_id(0) // column_programs).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def program_column(column_programs, SPAN: tl.constexpr):
    """First column of a program, int64."""
    return (tl.program_id(0) % column_programs).to(tl.int64) * SPAN


@triton.jit
def aligned(columns, ALIGN: tl.constexpr):
    """``columns`` in a form from which the compiler sees that ALIGN divides it."""
    return columns // ALIGN * ALIGN
