"""The `tele` command: one module a verb."""
