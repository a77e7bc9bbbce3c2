"""Results as JSON, CSV and Markdown, with what may be said of them."""
