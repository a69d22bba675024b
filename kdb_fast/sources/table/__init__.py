"""Records of any table, view or query of the user's."""
