"""Accuracy of compressed models: the published policy and ours at the same numbers of parameters."""
