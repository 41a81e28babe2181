"""Layers that join the attention operators to networks."""
