"""What scores are: exact metrics over ranks, comparisons of models, likeness of representations."""
