"""Metrics, logs and tracing: leaves that take numbers."""
