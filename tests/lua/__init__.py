"""Each script against a real Redis: the whole state is seeded, one step runs, the whole state is compared."""
