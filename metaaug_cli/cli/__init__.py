"""The command line: one file per command, each parsing, calling the library and showing the result."""
