"""The `spqr` command, installed as the import package spqr_cli: parsing and printing only."""
