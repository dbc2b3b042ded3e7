"""The study whose systems are recipes of ours, run as a whole: its rows, their folder, the workers."""
