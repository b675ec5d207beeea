"""The machine under a process: its platform, memory, compiled programs, and peak FLOP/s."""
