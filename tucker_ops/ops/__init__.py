"""The custom op: schema, argument checks, fake, autograd, autocast, and the reference in plain PyTorch.

Imports no backend: `tucker_ops.backends.select` registers the implementation.
"""
