"""What a recording can decide about the models of a report, and what more of it could; docs/power.md."""
