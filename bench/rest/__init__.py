"""The REST API measured over HTTP, beside the figures of the system that inspired this one."""
