"""Numeric building blocks of a decoder layer, and the choice between implementations by device.

They know tensors, not models. ``torch_ops`` holds the references that run on any device; ``linear`` picks the
fastest form of a weight matrix for a device.
"""
