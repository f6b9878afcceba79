"""Datasets: descriptions (spec), files on disk (layouts, files), and the drawn one (phantom)."""
