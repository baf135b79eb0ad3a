"""Owns the chaos harness: journals, checker, audit, process control, proxy; none imports the engine."""
