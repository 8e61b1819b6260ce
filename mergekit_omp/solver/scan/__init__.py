"""OMP in which every step scans all atoms."""
