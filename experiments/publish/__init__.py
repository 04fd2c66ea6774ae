"""Models and policies as others load them, with cards."""
