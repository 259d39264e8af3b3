"""From a photograph to labels."""
