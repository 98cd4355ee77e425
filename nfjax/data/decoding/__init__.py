"""From the bytes of an image file to pixels: formats, JPEG in all its oddities, crops."""
