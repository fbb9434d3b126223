"""Checkpoints in (GGUF, PyTorch pickles), model folders with safetensors out."""
