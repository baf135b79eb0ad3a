"""The parent process that forks, pins, watches and restarts workers."""
