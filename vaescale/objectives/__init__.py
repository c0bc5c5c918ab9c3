"""What is minimized: per-example Terms in, one number out. The objective alone reduces over the batch."""
