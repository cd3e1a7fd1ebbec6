"""The network as a graph: captured, normalised, cut into stages, with the place of every quantizer."""
