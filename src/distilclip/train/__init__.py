"""Train a student: objective, step, loop, optimizer, checkpoint."""
