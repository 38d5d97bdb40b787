"""What one can touch: `python -m play` lists it. Nothing imports this; it may import anything."""
