"""q(z|x) bodies and decoders: one module a network, its recipe section in `config.py`, the contract in `base.py`."""
