"""Weights of 8 and 4 bits: read from GPTQ, AWQ and compressed-tensors checkpoints, or made of floating ones at load."""
