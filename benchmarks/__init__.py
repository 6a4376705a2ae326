"""What measures the package's speed; README.md has the commands."""
