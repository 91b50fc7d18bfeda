"""How plans are shown: tables, pictures, progress."""
