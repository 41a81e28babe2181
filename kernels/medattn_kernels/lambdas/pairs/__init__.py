"""Lambda attention with the queries first: what each query takes from each position, then the values."""
