"""Small parts under the stopwatch."""
