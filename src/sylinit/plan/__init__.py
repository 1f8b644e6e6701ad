"""What is computed where: a model's parts, a trial run, its heads, the sites, and what was gained."""
