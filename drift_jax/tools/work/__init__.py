"""What the commands do: each module here is that of the command of its name.

The commands themselves hold their flags, and import these when they have read
them: a mistake and --help take no time.
"""
