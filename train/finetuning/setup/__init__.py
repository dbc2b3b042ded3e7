"""What happens before the first step: data, checks, targets, network, closed-form start, resuming."""
