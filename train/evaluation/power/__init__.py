"""What other numbers of stimuli, repetitions and sites would show: widths of intervals, and power; docs/power.md."""
