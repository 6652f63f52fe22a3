"""Running quantized models on the CPU; needs NumPy only."""
