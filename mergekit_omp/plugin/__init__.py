"""How mergekit finds this package and calls it."""
