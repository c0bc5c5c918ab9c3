"""Lossless coding of images by a trained VAE: bits back with asymmetric numeral systems. Townsend, Bird & Barber 2019."""
