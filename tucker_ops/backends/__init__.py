"""Backends of the op, one file each, and the choice between them."""
