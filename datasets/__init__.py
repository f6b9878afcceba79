"""Datasets: descriptions, files and masks, splits, the cache of decoded images, phantoms."""
