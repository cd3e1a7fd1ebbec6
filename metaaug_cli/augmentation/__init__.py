"""Changed copies of calibration images: fixed operations and the learned augmenter of MetaAug."""
