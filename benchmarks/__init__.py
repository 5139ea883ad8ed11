"""Benchmarks of gpuconst against its peers; run as ``python -m benchmarks`` from the repository."""
