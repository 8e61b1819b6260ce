"""Describe what a run will do and what it did: forecast, record, summary and page."""
