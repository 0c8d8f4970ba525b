"""The parts of scripts/benchmark.py: workloads, their timing in processes of their own, and the report."""
