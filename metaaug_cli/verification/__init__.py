"""Whether the exported file computes what was measured, and how accurate that is."""
