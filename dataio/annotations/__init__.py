"""Annotation files of labeling tools, drawn as masks: tools.py lists them, importer.py judges and draws."""
