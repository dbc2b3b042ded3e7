"""What a recipe costs: memory and communication under each strategy."""
