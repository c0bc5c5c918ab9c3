"""Models, each built from a network, a posterior and a likelihood; their forward pass returns Terms."""
