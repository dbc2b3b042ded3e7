"""The report: what it knows of runs and searches, as tables, figures and a page."""
