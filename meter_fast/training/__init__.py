"""Training: processes, engine, optimizer, checkpoints, monitor. Nothing here knows a task."""
