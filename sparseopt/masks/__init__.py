"""Which weights matter: mask sets, their files, finding, comparing and merging."""
