"""The admin command line, and the developer's commands."""
