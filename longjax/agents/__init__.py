"""Long inputs read in turns."""
