"""The HTTP API and the command line: what callers meet.

Takes the engine's public names only; never imports kernels, never imports torch.
"""
