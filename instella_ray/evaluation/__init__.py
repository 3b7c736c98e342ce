"""Bulk sampling, metrics and reports."""
