"""Train, export, compress, evaluate and publish the bundles that worker/ serves."""
