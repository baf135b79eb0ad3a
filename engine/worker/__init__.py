"""What one worker process does: fetch, run, settle."""
