"""The tqe command: a file a noun, and the composition root."""
