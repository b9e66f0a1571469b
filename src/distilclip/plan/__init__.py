"""Estimate the time, memory, disk and cost of every stage on machines that are not here."""
