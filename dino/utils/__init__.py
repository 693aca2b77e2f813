"""Errors, files written whole, devices, recipes by name, the environment report. Imports nothing of dino."""
