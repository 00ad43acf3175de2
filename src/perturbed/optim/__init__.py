"""Optimisers, schedules, and how one step is taken."""
