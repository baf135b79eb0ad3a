"""The same work through other queues, side by side."""
