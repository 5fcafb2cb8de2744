"""Rehearses a step on GPUs that are not there: torch's real CUDA host code, a pretended runtime."""
