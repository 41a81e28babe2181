"""Attention networks for 3D medical segmentation: data, networks, training, inference and reports."""

__version__ = "0.1.0"
