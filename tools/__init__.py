"""Commands around main.py."""
