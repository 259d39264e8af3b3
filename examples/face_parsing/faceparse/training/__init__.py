"""Settings, losses, the loop, checkpoints, several trainings."""
