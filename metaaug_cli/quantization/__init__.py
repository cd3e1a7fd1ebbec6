"""Quantizers, blocks and their reconstruction."""
