"""Owns the chaos harness: journals, audit and checker that import nothing of the engine; processes; proxy."""
