"""Attention operators for images and volumes: layout [B, *size, heads, head size], one to three spatial axes.

Needs torch only. The mathematics, gradients and memory of each operator are in kernels/README.md.
"""

from medattn_kernels.axial import axial_attention, logit_moments
from medattn_kernels.block import block_attention
from medattn_kernels.crosscov import cross_covariance_attention
from medattn_kernels.lambdas import lambda_attention

__all__ = [
    "axial_attention",
    "block_attention",
    "cross_covariance_attention",
    "lambda_attention",
    "logit_moments",
]
