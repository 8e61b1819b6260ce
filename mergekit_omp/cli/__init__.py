"""The command `mergekit-omp`: one file a subcommand."""
