"""Devices, weights and requests: everything between a prompt and a clip."""
