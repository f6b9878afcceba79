"""The networks of Section 3.3 and of Hung et al."""
