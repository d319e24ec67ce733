"""Measurement: paired timings, and what is measured with them."""
