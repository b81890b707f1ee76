"""Labels from strokes: the folder that is labeled, and the head that learns from it."""
