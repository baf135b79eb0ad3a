"""Figures of the duration model: what ordering gains on traces, and what scoring costs."""
