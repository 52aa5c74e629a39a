"""Helpers for all packages: options, files, pictures, random numbers, precision."""
