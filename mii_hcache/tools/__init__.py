"""Commands that look at the machine, at saved state, and at whether restoring tells the truth here."""
