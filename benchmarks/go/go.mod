module chanflow/benchmarks

go 1.21
