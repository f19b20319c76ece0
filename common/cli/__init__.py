"""The command line: flags, what they name opened once, and how a script ends."""
