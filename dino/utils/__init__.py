"""What every part may use: errors and files written whole, devices, recipes by name."""
