"""What is measured: a file per case. See `benchmarks.runner.Case` for what each of them offers."""
