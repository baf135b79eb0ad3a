"""The shared memory in which each worker has a row; knows nothing of Redis."""
