"""Objective, step, loop, optimizer, checkpoint."""
