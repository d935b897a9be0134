"""Sizes: what a model takes, where, and whether it fits."""

from onegpu.placement.memory import MemoryRow, memory_table

__all__ = ["MemoryRow", "memory_table"]
