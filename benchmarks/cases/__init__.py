"""The cases, one file an op or a kind of model; see ``benchmarks/case.py``."""
