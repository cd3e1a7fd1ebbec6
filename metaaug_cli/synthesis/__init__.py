"""Calibration images made from the network alone."""
