"""Programs beside the product: benchmarks. Run as `python -m tools.NAME`."""
