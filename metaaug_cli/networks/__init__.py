"""The user's network: where it comes from, its weights, and how it wants its images."""
