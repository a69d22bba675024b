"""Where records come from: KameleonDB's tables or a JSON Lines file."""
