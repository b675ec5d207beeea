"""The machine under a process: its platform, memory, compiled programs and peak FLOP/s; and chips that are known."""

COMPILE_ANEW = "JAXINFRA_COMPILE_ANEW"
"""Environment variable that has a start compile all programs anew, and replace those in the compile cache."""
