"""Errors, whole files, devices, recipes by name, old module paths, the environment report. Imports nothing of dino."""
