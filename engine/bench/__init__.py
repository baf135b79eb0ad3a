"""The installed part of the benchmarks, behind `tqe bench`; bench/README.md states the method."""
