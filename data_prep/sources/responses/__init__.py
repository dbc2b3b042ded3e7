"""The responses of the source `folder`: arrays and tables, whose rows they are, which columns are sites."""
