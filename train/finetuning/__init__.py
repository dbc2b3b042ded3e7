"""How a network is trained: preparation, starting points, the loop, schedules; and what a step of it needs."""
