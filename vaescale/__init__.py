"""Variational autoencoders with calibrated decoders, from one laptop to many GPU nodes."""

__version__ = "0.2.0"
