"""The second player of adversarial objectives: discriminators of images, latents and pairs of both, and their losses."""
