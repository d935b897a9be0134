"""What onegpu claims, measured: each module is one benchmark, run as ``python -m benchmarks.NAME --help``.

A benchmark compares ours with a peer in one run and stores its rows, with the environment they were taken in, under
``results/<device>/NAME.jsonl``; ``python -m benchmarks.tables`` writes the tables of README.md and docs/ from those.
"""
