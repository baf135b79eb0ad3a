"""The housekeeping child of the supervisor: one file a duty."""
