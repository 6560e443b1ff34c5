"""Glue to verl 0.9.1: one file per seam."""
