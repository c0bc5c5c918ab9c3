"""Likelihoods p(x|z): one module for each family, the recipe sections in `config.py`, the contract in `base.py`."""
