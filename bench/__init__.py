"""The benchmark: the product's own code against the floor, a bare loop, in the same run."""
