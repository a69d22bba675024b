"""Records into KameleonDB's own tables."""
