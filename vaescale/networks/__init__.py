"""Encoders and decoders: one module for each network, the recipe sections in `config.py`, the contract in `base.py`."""
