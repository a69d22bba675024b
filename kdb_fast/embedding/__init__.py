"""Texts to vectors: the encoder of one process."""
