"""Pure tensor mathematics; imports torch and nothing else."""
