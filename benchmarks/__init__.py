"""What is fast, beside what else there is: `python -m benchmarks --help`."""
