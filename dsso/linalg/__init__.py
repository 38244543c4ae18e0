"""Pure tensor mathematics; imports torch and the standard library, nothing else."""
