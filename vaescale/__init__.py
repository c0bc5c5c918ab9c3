"""Variational autoencoders with calibrated decoders, from one laptop to many GPU nodes."""

__version__ = "0.1.0"
