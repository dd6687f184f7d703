"""One script a question: both sides measured in one run, a ratio printed, rows appended to `benchmarks/results`."""
