"""A checkpoint into a live model: each rank reads its own bytes, once, and nothing is sent between ranks."""
