"""Bytes on disk: bitsandbytes 4-bit and 8-bit state dicts, checkpoint folders, GGUF input."""
