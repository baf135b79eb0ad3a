"""Benchmarks of the source tree; those that are installed are behind `tqe bench`."""
