"""The room of the duration model, which is not part of this release."""
