"""Results made readable: tables for terminal and Markdown, plots, and one self-contained HTML page."""
