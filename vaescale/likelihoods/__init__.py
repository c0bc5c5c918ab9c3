"""p(x|z): one module a family, its recipe section in `config.py`, the contract in `base.py`."""
