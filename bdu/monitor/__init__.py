"""Watching a run and telling about it."""
