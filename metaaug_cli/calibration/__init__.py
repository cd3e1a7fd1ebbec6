"""Calibration sets: built from folders, judged, inspected and compared."""
