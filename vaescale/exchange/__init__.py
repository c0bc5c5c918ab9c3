"""Weights of other libraries' models: read, and written so that these open them."""
