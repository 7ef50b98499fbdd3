"""Where flashcomm meets other software: one module a seam, each inert until it is imported by name."""
