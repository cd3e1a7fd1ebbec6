"""What a run is told to do: recipes, their sections, and what is said of mistakes in them."""
