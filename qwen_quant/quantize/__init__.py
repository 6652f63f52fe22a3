"""Quantizing a checkpoint: calibration, the GPTQ solver, and the stream over decoder layers."""
