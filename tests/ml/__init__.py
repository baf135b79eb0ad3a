"""Tests of the duration model."""
