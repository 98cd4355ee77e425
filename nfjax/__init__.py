"""Residual networks without batch normalization: initializers, networks, their cost and their training.

    from nfjax import cost, initializers, resnet

After Civitelli et al., "A Robust Initialization of Residual Blocks for Effective ResNet Training without Batch
Normalization" (arXiv 2112.12299).
"""

__version__ = "0.1.0"
