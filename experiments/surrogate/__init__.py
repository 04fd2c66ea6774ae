"""Response surfaces: fitted to runs, and who learns what on them."""
