"""The networks of Section 3.3: generators (image to mask, mask to image) and pixel-wise discriminators."""
