"""Measures, tables and pictures."""
