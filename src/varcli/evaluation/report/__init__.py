"""Results of `var eval` and training runs as one page that needs nothing else, or as Markdown. No torch here."""
