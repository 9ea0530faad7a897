"""Bytes under keys. Knows no tensors, no models, no engine."""
